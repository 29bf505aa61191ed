"""Prints the bill of materials of a release: CycloneDX 1.6, made of Cargo.lock and of what cargo resolves.

    sbom.py FEATURES

It has the crates of both architectures that are released, without those that only tests use. The scope of
crates that only the build runs (build scripts and procedural macros) is `excluded`. The same tree gives the
same text: there is no time in it, and the serial number comes from the rest.
"""

import json
import re
import subprocess
import sys
import uuid

TARGETS = ("x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu")

# Depth, name, version, then the licence and the repository.
ROW = re.compile(r"^(\d+)\|(\S+) v(\S+)[^|]*\|([^|]*)\|([^|]*?)(?: \(\*\))?$")


def tree(features, edges, target):
    """The rows of `cargo tree`: depth, reference, licence, repository."""
    command = ["cargo", "tree", "--locked", "--prefix", "depth", "--format", "|{p}|{l}|{r}"]
    command += ["--edges", edges, "--target", target, "--features", features]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for line in printed.splitlines():
        found = ROW.match(line)
        if not found:
            sys.exit(f"sbom.py: cannot read the row {line!r} of cargo tree")
        depth, name, version, licence, repository = found.groups()
        yield int(depth), (name, version), licence.replace("/", " OR "), repository


def purl(crate):
    return f"pkg:cargo/{crate[0]}@{crate[1]}"


def resolved(features):
    """Licence, repository and dependencies of each crate; and the crates that are in the program."""
    found, linked = {}, set()
    for target in TARGETS:
        above = []
        for depth, crate, licence, repository in tree(features, "normal,build", target):
            above = [*above[:depth], crate]
            entry = found.setdefault(crate, (licence, repository, set()))
            if depth:
                found[above[-2]][2].add(crate)
            assert entry[0] == licence, crate
        linked |= {crate for _, crate, _, _ in tree(features, "normal,no-proc-macro", target)}
    return found, linked


def component(crate, entry, checksum, required):
    licence, repository, _ = entry
    made = {
        "type": "library",
        "bom-ref": purl(crate),
        "name": crate[0],
        "version": crate[1],
        "scope": "required" if required else "excluded",
        "purl": purl(crate),
    }
    if checksum:
        made["hashes"] = [{"alg": "SHA-256", "content": checksum}]
    if licence:
        made["licenses"] = [{"expression": licence}]
    if repository.startswith("https://"):
        made["externalReferences"] = [{"type": "vcs", "url": repository}]
    return made


def bill(features):
    # Of Python 3.11; notices.py, which packages need, does without.
    import tomllib

    with open("Cargo.lock", "rb") as file:
        packages = tomllib.load(file)["package"]
    checksums = {(each["name"], each["version"]): each.get("checksum") for each in packages}
    with open("Cargo.toml", "rb") as file:
        package = tomllib.load(file)["package"]
    own = (package["name"], package["version"])
    crates, linked = resolved(features)
    product = component(own, crates[own], None, True) | {"type": "application"}
    del product["scope"]
    product["description"] = package["description"]
    made = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": product,
            "properties": [
                {"name": "cargo:features", "value": features},
                *({"name": "cargo:target", "value": target} for target in TARGETS),
            ],
        },
        "components": [
            component(crate, crates[crate], checksums[crate], crate in linked)
            for crate in sorted(crates)
            if crate != own
        ],
        "dependencies": [
            {"ref": purl(crate), "dependsOn": sorted(map(purl, crates[crate][2]))} for crate in sorted(crates)
        ],
    }
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(made, sort_keys=True))
    schema = "http://cyclonedx.org/schema/bom-1.6.schema.json"
    return {"$schema": schema, "serialNumber": f"urn:uuid:{serial}"} | made


if __name__ == "__main__":
    json.dump(bill(sys.argv[1]), sys.stdout, indent=2, ensure_ascii=False)
    print()
