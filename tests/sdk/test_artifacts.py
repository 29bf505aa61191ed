"""What `./dev release` makes, and that it makes nothing of a program that does not serve.

The licences and notices of all libraries are part of it.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib

import pytest

import harness

ROOT = harness.ROOT
sys.path.insert(0, str(ROOT / ".ci"))

import notices  # noqa: E402


def run(*command, **settings):
    command = [str(each) for each in command]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **settings)


# ---- licences and notices ----------------------------------------------------------------------


@functools.cache
def printed():
    done = run(ROOT / "dev", "notices", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_crate_of_the_bill_of_materials_has_its_notice():
    bill = json.loads(run(ROOT / "dev", "sbom", cwd=ROOT).stdout)
    listed = set(re.findall(r"^(\S+) (\d\S*)(?: \(.+\)|, .*: .*)$", printed(), re.MULTILINE))
    assert {(each["name"], each["version"]) for each in bill["components"]} == listed
    assert len(listed) > 300


@pytest.mark.parametrize(
    "words",
    [
        # Code in C, which crates bring along, and files in folders.
        "tikv-jemalloc-sys .* \\(jemalloc/COPYING\\)",
        "libz-ng-sys .* \\(src/zlib-ng/LICENSE.md\\)",
        "zstd-sys .* \\(zstd/LICENSE\\)",
        "ring .* \\(third_party/fiat/LICENSE\\)",
        "crc-catalog .* \\(LICENSES/MIT.txt\\)",
        # A crate without a file.
        "alloc-stdlib .*: as alloc-no-stdlib",
        "Permission is hereby granted, free of charge, to any person obtaining",
        "Redistributions in binary form must reproduce the above",
    ],
)
def test_the_notices_have(words):
    assert re.search(f"^.*{words}", printed(), re.MULTILINE)


def test_the_notices_are_the_same_on_each_machine():
    assert str(ROOT) not in printed() and "/registry/src/" not in printed()
    assert run(ROOT / "dev", "notices", cwd=ROOT).stdout == printed()


def test_a_text_of_several_crates_stands_once():
    crates = {("a", "1.0.0"): ("MIT", "", set()), ("b", "2.0.0"): ("MIT", "", set())}
    shipped = {crate: {"LICENSE": "The text."} for crate in crates}
    text, _ = notices.notices(crates, shipped)
    assert text.count("The text.") == 1
    assert "a 1.0.0 (LICENSE)\nb 2.0.0 (LICENSE)\n\nThe text.\n" in text


def test_the_files_of_a_crate_are_found_in_all_its_folders(tmp_path):
    files = ("LICENSE-MIT", "copying.txt", "sub/NOTICE", "LICENSES/BSD-3-Clause.txt", "COPYRIGHT", "terms")
    for name in (*files, "src/license.rs", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"text  \r\n")
    assert notices.texts(tmp_path, "terms") == dict.fromkeys(files, "text")


def problems(crates, shipped):
    """What is wrong with crates (name: licence, repository), where these ones ship a file."""
    known = {(name, "1.0.0"): (*entry, set()) for name, entry in crates.items()}
    texts = {crate: {"LICENSE": "x"} if crate[0] in shipped else {} for crate in known}
    return notices.without_file(known, texts)[1]


def test_a_crate_without_a_file_needs_a_reason(monkeypatch):
    monkeypatch.setattr(notices, "SAME_REPOSITORY", {"one": "other"})
    monkeypatch.setattr(notices, "APACHE_ALONE", {"apache"})
    good = {"one": ("MIT", "r"), "other": ("MIT", "r.git"), "apache": ("Apache-2.0", "s")}
    assert problems(good, {"other"}) == []
    assert problems(good | {"new": ("MIT", "t")}, {"other"}) == [
        "new 1.0.0: no licence file in the crate (MIT, t)"
    ]
    # A reason that does not hold is none.
    assert len(problems(good, set())) == 2
    assert len(problems(good | {"other": ("MIT", "elsewhere")}, {"other"})) == 1
    assert len(problems(good | {"apache": ("MIT", "s")}, {"other"})) == 1
    # Nor does one stay without need.
    assert len(problems(good, {"other", "apache"})) == 1


def test_the_command_fails_on_a_problem(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(notices, "APACHE_ALONE", set())
    with pytest.raises(SystemExit) as raised:
        notices.main("default")
    assert "kube-core" in str(raised.value)


# ---- a release ---------------------------------------------------------------------------------

# In place of the program that benches/pgo.sh has built: the program of the tests, or one with a defect.
PROGRAMS = {
    "sound": 'exec "{binary}" "$@"',
    "does not start": "exit 132",
    "knows its version alone": '[ "$1" = --version ] || exit 1; exec "{binary}" "$@"',
    "ends badly": 'case $1 in --demo) "{binary}" "$@" & trap "kill $!; wait; exit 3" TERM; wait ;; '
                  '*) exec "{binary}" "$@" ;; esac',
}


def released(folder, program):
    """Runs `./dev release` in a checkout that has its program already, and notes what cargo-deb is given."""
    checkout = folder / "checkout"
    (checkout / "benches").mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.name not in ("benches", "target", ".dev"):
            (checkout / path.name).symlink_to(path)
    for path in (ROOT / "benches").iterdir():
        if path.name != "pgo.sh":
            (checkout / "benches" / path.name).symlink_to(path)
    made = folder / "made"
    made.write_text(f"#!/bin/bash\n{PROGRAMS[program].format(binary=harness.binary())}\n")
    stubs = {
        checkout / "benches/pgo.sh": f"echo {made}",
        checkout / ".dev/bin/cargo-deb": f"ls target/notices target/debian-unit >{folder}/deb.txt",
    }
    for path, script in stubs.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{script}\n")
    for path in (made, *stubs):
        path.chmod(0o755)
    values = {**os.environ, "CARGO_TARGET_DIR": str(folder / "target")}
    return run("./dev", "release", folder / "dist", cwd=checkout, env=values)


def test_a_release_has_the_program_its_licences_and_the_bill_of_materials(tmp_path):
    done = released(tmp_path, "sound")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^smoke.py: vllm-lb [\d.]+ serves and stops$", done.stdout, re.MULTILINE)
    version = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["version"]
    name = f"vllm-lb-{version}-{os.uname().machine}-linux"
    assert {path.name for path in (tmp_path / "dist").iterdir()} == {
        f"{name}.tar.gz", f"vllm-lb-{version}.cdx.json",
    }
    with tarfile.open(tmp_path / "dist" / f"{name}.tar.gz") as archive:
        files = {one.name.removeprefix(f"{name}/"): one for one in archive.getmembers() if one.isfile()}
        assert files.keys() == {
            "vllm-lb", "LICENSE", "THIRD-PARTY-NOTICES", "README.md", "lb.yaml", "vllm-lb.service",
        }
        assert {one.uid for one in files.values()} == {0}
        assert archive.extractfile(files["THIRD-PARTY-NOTICES"]).read().decode() == printed()
    assert (tmp_path / "deb.txt").read_text().split() == [
        "target/debian-unit:", "vllm-lb.service", "target/notices:", "THIRD-PARTY-NOTICES",
    ]


@pytest.mark.parametrize("program", sorted(PROGRAMS.keys() - {"sound"}))
def test_nothing_is_made_of_a_program_that(program, tmp_path):
    done = released(tmp_path, program)
    assert done.returncode != 0
    assert not (tmp_path / "dist").exists() and not (tmp_path / "deb.txt").exists()
