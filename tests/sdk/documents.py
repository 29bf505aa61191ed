"""Reads the pages for people: their blocks, tables, links and names in code style.

What a block is shows its first word: `bash` and `python` are run, in the order of the page, in one folder; a
`text` block directly behind one of them is what it prints (`…` stands for anything, alone on a line for any
lines). `yaml` is a configuration, whole or in part, and `file=NAME` puts it into the folder; `yaml chart` has
values of the Helm chart. `console` is not run: its commands begin with `$ `. `sql` runs over a file of
traces. Nothing else is allowed but `text` and `json`.
"""

import dataclasses
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]

LANGUAGES = {"bash", "python", "text", "yaml", "console", "sql", "json"}

FENCE = re.compile(r"^```(.*)$")
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclasses.dataclass
class Block:
    language: str
    line: int
    text: str
    file: str | None = None
    # What running it prints.
    output: str | None = None
    # Whether it is no configuration but values of charts/vllm-lb.
    chart: bool = False


@dataclasses.dataclass
class Page:
    name: str
    text: str

    @property
    def is_comparison(self):
        """Whether it speaks of another product, too: only the last cells of its tables are about this one."""
        return "coming-from-" in self.name

    def lines(self):
        """The lines outside of fenced blocks, with their numbers."""
        fenced = False
        for number, line in enumerate(self.text.splitlines(), 1):
            if FENCE.match(line):
                fenced = not fenced
            elif not fenced:
                yield number, line

    def blocks(self):
        """The fenced blocks in their order."""
        found, opened, body, gap = [], None, [], False
        for number, line in enumerate(self.text.splitlines(), 1):
            fence = FENCE.match(line)
            if fence and opened is None:
                opened, body = (fence[1].split(), number), []
            elif fence:
                (words, start), opened = opened, None
                found.append(self.block(words, start, "\n".join(body) + "\n", found, gap))
                gap = False
            elif opened is not None:
                body.append(line)
            elif line.strip():
                gap = True
        return [block for block in found if block is not None]

    def block(self, words, line, text, before, gap):
        language = words[0] if words else ""
        last = before[-1] if before else None
        if language == "text" and last and last.language in ("bash", "python") and not gap:
            last.output = text
            return None
        files = [word.removeprefix("file=") for word in words[1:] if word.startswith("file=")]
        return Block(language, line, text, files[0] if files else None, chart="chart" in words[1:])

    def prose(self):
        """The lines that are about this product, with their numbers; tables without the cells on others."""
        for number, line in self.lines():
            if self.is_comparison and line.startswith("|"):
                line = line.rstrip("| ").rsplit(" | ", 1)[-1]
            yield number, line

    def spans(self):
        """What stands in code style, with its line."""
        for number, line in self.prose():
            for span in SPAN.findall(line):
                yield number, span

    def links(self):
        # A link's text may go over the end of a line, its target does not.
        for number, line in self.lines():
            for target in LINK.findall(SPAN.sub("", line)):
                yield number, target

    def anchors(self):
        """What a link to a heading of the page says behind its #."""
        for _, line in self.lines():
            heading = re.match(r"^#+ (.*)$", line)
            if heading:
                kept = re.sub(r"[^\w\- ]", "", heading[1].lower().replace("`", ""))
                yield kept.replace(" ", "-")

    def commands(self):
        """The commands that are not run: of console blocks, and of blocks that are indented."""
        for block in self.blocks():
            if block.language == "console":
                for line in block.text.replace("\\\n", " ").splitlines():
                    if line.startswith("$ "):
                        yield block.line, line.removeprefix("$ ")
        before = ""
        for number, line in self.lines():
            if line.startswith("    ") and not before.lstrip().startswith(("-", "*", "|")):
                yield number, line.strip()
            else:
                before = line or before


def page(name):
    return Page(name, (ROOT / name).read_text())


def pages():
    docs = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))
    return [page(name) for name in ["README.md", "CONTRIBUTING.md", *docs]]


def matches(expected, printed):
    """Whether a block printed what the page shows."""
    pattern = []
    for line in expected.strip("\n").splitlines():
        if line.strip() == "…":
            pattern.append(r"(?:.*\n)*?")
        else:
            pattern.append(".*".join(re.escape(part) for part in line.rstrip().split("…")) + r"[ \t\r]*\n")
    return re.fullmatch("".join(pattern), printed.strip("\n") + "\n") is not None


def dev_tasks():
    """The commands of `./dev`."""
    cases = re.findall(r"^ {4}([a-z]+(?: \| [a-z]+)*)\) ", (ROOT / "dev").read_text(), re.MULTILINE)
    return {task for case in cases for task in case.split(" | ")}
