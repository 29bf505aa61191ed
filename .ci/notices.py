"""Prints the licence texts and notices of the libraries of a release, which its packages and its image carry.

    notices.py FEATURES

The crates are those of the bill of materials (sbom.py), and the texts are the files that the crates ship,
also those of C code in them. A text that several crates have is printed once. A crate without such a file
is an error unless a table below names its text. The output is the same on each machine.
"""

import json
import pathlib
import re
import subprocess
import sys

import sbom

NAMES = re.compile(r"(?i)(un)?licen[cs]e|copying|notice|copyright")

# Crates without a file, each with the crate of the same repository that ships the file of both.
SAME_REPOSITORY = {"alloc-stdlib": "alloc-no-stdlib", "asn1-rs-impl": "asn1-rs"}

# Crates without a file under Apache-2.0 alone, whose repositories have no NOTICE: the product's own LICENSE,
# which is shipped beside the output, has the text of that licence.
APACHE_ALONE = {"kube", "kube-client", "kube-core", "opentelemetry", "opentelemetry_sdk"}

STANDARD_LIBRARY = (
    "The standard library of Rust, MIT OR Apache-2.0, https://github.com/rust-lang/rust: "
    "the LICENSE of vllm-lb has the text of Apache-2.0"
)


def packages():
    """The packages of the lock file for the targets of a release; cargo fetches those that are missing."""
    command = ["cargo", "metadata", "--locked", "--format-version", "1"]
    for target in sbom.TARGETS:
        command += ["--filter-platform", target]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {(each["name"], each["version"]): each for each in json.loads(printed)["packages"]}


def texts(folder, named=None):
    """The licence files of a crate in this folder, with their texts. `named`: the manifest's own one."""
    found = {}
    for path in sorted(folder.rglob("*")):
        is_text = NAMES.match(path.name) or path.parent.name.upper() == "LICENSES"
        if path.is_file() and (is_text or path == folder / (named or "")) and path.suffix != ".rs":
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            found[str(path.relative_to(folder))] = "\n".join(line.rstrip() for line in lines).strip("\n")
    return found


def repository(crates, name):
    return {entry[1].removesuffix(".git") for crate, entry in crates.items() if crate[0] == name}


def without_file(crates, shipped):
    """A row for each crate that ships no text, and the problems of such crates and of the tables above."""
    rows, problems = [], []
    missing = {crate for crate in crates if not shipped[crate]}
    for crate in sorted(missing):
        (name, version), (licence, place, _) = crate, crates[crate]
        other = SAME_REPOSITORY.get(name)
        with_file = any(shipped[one] for one in crates if one[0] == other)
        if other and with_file and repository(crates, name) & repository(crates, other):
            rows.append(f"{name} {version}, {licence}, {place}: as {other}")
        elif name in APACHE_ALONE and licence == "Apache-2.0":
            rows.append(f"{name} {version}, {licence}, {place}: the LICENSE of vllm-lb has this text")
        else:
            problems.append(f"{name} {version}: no licence file in the crate ({licence}, {place})")
    names = {name for name, _ in missing}
    unneeded = sorted((SAME_REPOSITORY.keys() | APACHE_ALONE) - names)
    problems += [f"{name}: is in a table of .ci/notices.py, and needs it no more" for name in unneeded]
    return rows, problems


def notices(crates, shipped):
    """The output for these crates (sbom.resolved) and the files that they ship, and problems."""
    users = {}
    for crate in sorted(crates):
        for name, text in shipped[crate].items():
            users.setdefault(text, []).append(f"{crate[0]} {crate[1]} ({name})")
    rows, problems = without_file(crates, shipped)
    parts = ["Licences and notices of the libraries that vllm-lb is built with. Its own licence: LICENSE."]
    parts.append("\n".join(["Libraries that ship no text of their licence:", "", STANDARD_LIBRARY, *rows]))
    parts += ["\n".join([*names, "", text]) for text, names in users.items()]
    return f"\n\n{'=' * 80}\n\n".join(parts) + "\n", problems


def main(features):
    crates, _ = sbom.resolved(features)
    known = packages()
    crates = {crate: entry for crate, entry in crates.items() if known[crate]["source"]}
    shipped = {
        crate: texts(pathlib.Path(known[crate]["manifest_path"]).parent, known[crate]["license_file"])
        for crate in crates
    }
    text, problems = notices(crates, shipped)
    if problems:
        sys.exit("\n".join(f"notices.py: {problem}" for problem in problems))
    sys.stdout.reconfigure(encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main(sys.argv[1])
