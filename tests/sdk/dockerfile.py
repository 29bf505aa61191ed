"""Reads a Dockerfile: stages, instructions, and which files of the tree reach the builder."""

import dataclasses
import fnmatch
import json
import re
import shlex


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction with its flags, such as `--from=build`."""

    name: str
    flags: dict
    value: str

    @property
    def words(self):
        """The value as words, in either of the two forms of a command."""
        return json.loads(self.value) if self.value.startswith("[") else shlex.split(self.value)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage with the name that others use, its base image and its instructions."""

    name: str
    base: str
    instructions: list

    def all(self, name):
        return [one for one in self.instructions if one.name == name]

    def last(self, name):
        return self.all(name)[-1]


def stages(text):
    """The stages of a Dockerfile."""
    found = []
    for name, rest in instructions(text):
        flags, value = flags_of(rest)
        if name == "FROM":
            base, _, alias = re.fullmatch(r"(\S+)( AS (\S+))?", value).groups()
            found.append(Stage(alias or str(len(found)), base, []))
        else:
            found[-1].instructions.append(Instruction(name, flags, value))
    return found


def instructions(text):
    """The instructions, each on one line."""
    lines = [line for line in text.splitlines() if not re.match(r"\s*(#|$)", line)]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, _, rest = line.strip().partition(" ")
        yield name.upper(), re.sub(r"\s+", " ", rest.strip())


def flags_of(rest):
    """Flags before the value; one that is repeated has the list of its values."""
    flags = {}
    while found := re.match(r"--([\w-]+)=(\S+)\s+", rest):
        flags.setdefault(found[1], []).append(found[2])
        rest = rest[found.end():]
    return flags, rest


def context(ignored, root, source):
    """The files of the tree that a COPY of this file or folder gets."""
    paths = [root / source] if (root / source).is_file() else sorted((root / source).rglob("*"))
    names = [str(path.relative_to(root)) for path in paths if path.is_file()]
    return [name for name in names if is_sent(ignored, name)]


def is_sent(ignored, path):
    """Whether a path of the tree reaches the builder: the last pattern that matches counts."""
    sent = True
    parents = [path.rsplit("/", depth)[0] for depth in range(path.count("/") + 1)]
    for line in ignored.splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#"):
            keep = pattern.startswith("!")
            if any(matches(pattern.lstrip("!").rstrip("/"), parent) for parent in parents):
                sent = keep
    return sent


def matches(pattern, path):
    """Whether a pattern names this path: a star stands for no slash."""
    parts, names = pattern.split("/"), path.split("/")
    return len(parts) == len(names) and all(map(fnmatch.fnmatchcase, names, parts))
