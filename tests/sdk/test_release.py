"""What a release is made of: the workflows, the bill of materials, and the source package."""

import copy
import functools
import json
import pathlib
import re
import subprocess
import tarfile
import tomllib

import pytest
import yaml
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

import chart
import harness
import rehearsal
import workflows

ROOT = harness.ROOT


def run(*command):
    command = [str(each) for each in command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


# ---- workflows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", workflows.workflows())
@pytest.mark.parametrize("check", workflows.CHECKS, ids=lambda check: check.__name__)
def test_a_workflow_has_no_problem(check, name):
    assert list(check(workflows.workflows()[name])) == []


# For each check, changes of the release workflow that it finds.
MISTAKES = (
    ("unknown_keys", "timeout-minutes: 30", "timeout-minuts: 30"),
    ("unknown_keys", "container: rust:1-bookworm", "containers: rust:1-bookworm"),
    ("unknown_keys", "runs-on: ubuntu-24.04\n", "runs-on: ubuntu-latest\n"),
    ("unknown_keys", "    shell: bash\n", "    shell: sh\n"),
    ("unknown_keys", "        id: image\n", "        ids: image\n"),
    ("other_rights", "permissions: {}", "permissions: {contents: read}"),
    ("other_rights", "      id-token: write\n", "      id-token: write\n      actions: write\n"),
    ("other_rights", "persist-credentials: false", "fetch-depth: 0"),
    ("foreign_actions", "actions/attest-sbom@v3", "other/attest-sbom@v3"),
    ("foreign_actions", "actions/attest-sbom@v3", "actions/attest-sbom@main"),
    ("foreign_actions", "workflows/ci.yaml", "workflows/test.yaml"),
    ("dangling_references", "needs: [test, packages, image]", "needs: [tests, packages, image]"),
    ("dangling_references", "steps.chart.outputs.digest", "steps.charts.outputs.digest"),
    ("dangling_references", 'echo "digest=$digest"', 'echo "sha=$digest"'),
    ("dangling_references", "matrix.runner", "matrix.machine"),
    ("dangling_references", "pattern: digest-*", "pattern: digests-*"),
    ("unsound_scripts", 'helm push', '"helm push'),
    ("unsound_scripts", '"$TOKEN" | docker', '"${{ github.token }}" | docker'),
    ("unsound_scripts", "          TAG: ${{ github.ref_name }}\n", ""),
    ("missing_programs", "./dev chart", "./dev charts"),
    ("missing_programs", "docker/Dockerfile", "docker/Containerfile"),
)


@pytest.mark.parametrize(("check", "text", "other"), MISTAKES)
def test_each_check_of_workflows_finds_a_mistake(check, text, other, tmp_path):
    before = (workflows.FOLDER / "release.yaml").read_text()
    assert text in before
    changed = tmp_path / "release.yaml"
    changed.write_text(before.replace(text, other))
    assert list(getattr(workflows, check)(workflows.read(changed)))


def test_every_check_of_workflows_has_a_mistake():
    assert {check for check, _, _ in MISTAKES} == {check.__name__ for check in workflows.CHECKS}


def test_zizmor_finds_no_weakness():
    run("zizmor", "--offline", "--strict-collection", "--quiet", ".github")


def test_zizmor_finds_a_weakness(tmp_path):
    folder = tmp_path / ".github/workflows"
    folder.mkdir(parents=True)
    (folder.parent / "zizmor.yml").write_text((ROOT / ".github/zizmor.yml").read_text())
    text = (workflows.FOLDER / "release.yaml").read_text()
    (folder / "release.yaml").write_text(text.replace("actions/attest-sbom@v3", "other/attest-sbom@v3"))
    command = ["zizmor", "--offline", "--strict-collection", ".github"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "unpinned-uses" in done.stdout


def test_continuous_integration_is_the_test_command():
    found = workflows.scripts(workflows.workflows()["ci"])
    assert [script for job, _, _, script in found if job == "test"] == ["./dev test"]


def test_continuous_integration_runs_the_image_and_the_fleet():
    """What no test here can do: there is no Docker."""
    found = workflows.scripts(workflows.workflows()["ci"])
    up, asked, alone, logs = [script for job, _, _, script in found if job == "containers"]
    files = "docker compose --file docker/compose.yaml --profile monitoring "
    assert up.startswith(f"{files}up ") and {"--build", "--wait"} <= set(up.split())
    assert "curl --fail " in asked and "Bearer sk-demo" in asked
    assert "sk-demo demo;" in (ROOT / "docker/keys.map").read_text()
    assert alone == "python3 .ci/smoke.py docker run --rm --network host vllm-lb"
    assert logs == f"{files}logs"


def test_nothing_is_published_before_the_tests_have_passed():
    jobs = workflows.workflows()["release"]["jobs"]
    assert jobs["test"]["uses"] == "./.github/workflows/ci.yaml"
    for name, job in jobs.items():
        if "write" in job["permissions"].values():
            assert "test" in job["needs"], name


def rehearsed(folder, tag, others=(), **defects):
    """The calls and the inputs of actions with which a tag is published, where there are other tags."""
    values = {
        "github.token": "secret", "github.actor": "someone", "github.sha": "0123abc",
        "github.repository": "Example/vllm-lb", "github.repository_owner": "Example",
        "github.ref_name": tag,
    }
    release = workflows.workflows()["release"]
    running = rehearsal.Rehearsal(folder, values, tags=[tag, *others], **defects)
    running.run_for_each_runner(release, "image")
    # The names that `./dev release` gives to its files.
    (folder / "dist").mkdir()
    for name in ("vllm-lb-{}-x86_64-linux.tar.gz", "vllm-lb_{}-1_amd64.deb", "vllm-lb-{}.cdx.json"):
        (folder / "dist" / name.format(tag.removeprefix("v"))).write_text("x")
    return running, running.run(release, "publish")


def test_a_tag_is_published_as_image_chart_and_release(tmp_path):
    running, given = rehearsed(tmp_path, "v1.2.3")
    image, digest = "ghcr.io/example/vllm-lb", rehearsal.DIGEST
    calls = running.calls()
    made = [call for call in calls if call.startswith("docker buildx imagetools create")]
    of_both = " ".join(f"{image}@{one}" for one in rehearsal.DIGESTS.values())
    expected = f"docker buildx imagetools create --tag {image}:1.2.3 --tag {image}:latest {of_both}"
    assert made == [expected]
    built = [call for call in calls if call.startswith("docker buildx build")]
    assert len(built) == 2
    for call in built:
        assert f"name={image},push-by-digest=true" in call
        assert "--build-arg FEATURES=default --build-arg PROFILED=yes --build-arg VERSION=1.2.3" in call
    [pushed] = [call for call in calls if call.startswith("helm push")]
    assert pushed.endswith(" oci://ghcr.io/example/charts")
    [published] = [call for call in calls if call.startswith("gh release create v1.2.3 ")]
    assert "--prerelease" not in published and "--latest=true" in published
    sums = (tmp_path / "dist/SHA256SUMS").read_text()
    for name in ("linux.tar.gz", "amd64.deb", "cdx.json", ".tgz"):
        assert name in sums and name in published
    attested = [inputs for action, inputs in given if "/attest-" in action]
    subjects = {inputs.get("subject-name"): inputs.get("subject-digest") for inputs in attested}
    assert subjects == {None: None, image: digest, "ghcr.io/example/charts/vllm-lb": digest}
    bills = [inputs["sbom-path"] for inputs in attested if "sbom-path" in inputs]
    assert bills and all((tmp_path / path).exists() for path in bills)
    assert not [call for call in calls if "secret" in call]


def test_a_tag_with_a_suffix_is_no_latest_release(tmp_path):
    running, _ = rehearsed(tmp_path, "v1.2.3-rc.1")
    assert not [call for call in running.calls() if ":latest" in call]
    assert [call for call in running.calls() if "--prerelease" in call and "--latest=false" in call]


@pytest.mark.parametrize(
    ("tag", "others", "latest"),
    [
        ("v1.10.0", ["v1.9.0", "v1.2.0"], True),
        ("v1.1.5", ["v1.2.0", "v1.1.4"], False),
        ("v1.2.0", ["v1.10.0-rc.1", "v2.0.0-rc.1"], True),
        ("v1.2.0-rc.1", ["v1.1.0"], False),
    ],
)
def test_only_the_highest_version_is_the_latest(tag, others, latest, tmp_path):
    """Regression: a patch of an earlier line moved `latest` back."""
    running, _ = rehearsed(tmp_path, tag, others)
    assert bool([call for call in running.calls() if ":latest" in call]) == latest
    [published] = [call for call in running.calls() if call.startswith("gh release create ")]
    assert f"--latest={str(latest).lower()} " in published


def test_the_image_of_each_runner_serves_before_it_has_a_tag(tmp_path):
    calls = rehearsed(tmp_path, "v1.2.3")[0].calls()
    [tagged] = [at for at, call in enumerate(calls) if "imagetools create" in call]
    for digest in rehearsal.DIGESTS.values():
        image = f"docker run --rm --network host ghcr.io/example/vllm-lb@{digest}"
        assert f"{image} --version" in calls[:tagged]
        for word in ("--demo", "health"):
            assert [call for call in calls[:tagged] if call.startswith(f"{image} {word} ")], word


@pytest.mark.parametrize(
    ("defect", "step"),
    [
        # Without the space the script finds no digest.
        ({"metadata": '{"containerimage.digest":"%s"}'}, "docker buildx build"),
        ({"metadata": '{\n  "containerimage.digest": "sha256:"\n}\n'}, "docker buildx build"),
        ({"image": "exit 132"}, "smoke.py"),
        ({"image": '[ "$1" = --version ] && exec "{binary}" "$@"; exit 1'}, "smoke.py"),
    ],
    ids=["no digest", "half a digest", "an image that does not start", "an image that does not serve"],
)
def test_a_bad_image_ends_the_release(defect, step, tmp_path):
    with pytest.raises(AssertionError, match=re.escape(step)):
        rehearsed(tmp_path, "v1.2.3", **defect)
    assert "imagetools create" not in (tmp_path / "log.txt").read_text()


def test_an_image_of_one_architecture_is_not_published(tmp_path):
    """Regression: an empty file in place of a digest made an image without an error."""
    running, _ = rehearsed(tmp_path, "v1.2.3")
    running.log.write_text("")
    (tmp_path / "digests/ubuntu-24.04-arm").write_text("")
    with pytest.raises(AssertionError, match="imagetools create"):
        running.run(workflows.workflows()["release"], "publish")
    assert "imagetools create" not in running.log.read_text()


def test_every_file_of_github_is_one_that_a_check_reads():
    found = [path for path in (ROOT / ".github").rglob("*") if path.is_file()]
    files = {str(path.relative_to(ROOT / ".github")) for path in found}
    assert files == {"zizmor.yml", *(f"workflows/{name}.yaml" for name in workflows.workflows())}


def test_a_tag_of_another_version_builds_nothing(tmp_path):
    command = ["./dev", "release", str(tmp_path / "dist"), "v99.0.0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the tag is v99.0.0" in done.stderr
    assert not (tmp_path / "dist").exists()


def test_the_chart_of_a_release_runs_its_image(tmp_path):
    run("./dev", "chart", tmp_path, "ghcr.io/example/vllm-lb")
    [package] = tmp_path.glob("vllm-lb-*.tgz")
    with tarfile.open(package) as archive:
        archive.extractall(tmp_path, filter="data")
    objects = chart.render(chart=tmp_path / "vllm-lb")
    [image] = {chart.container(objects)["image"]}
    version = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["version"]
    assert image == f"ghcr.io/example/vllm-lb:{version}"


# ---- bill of materials -------------------------------------------------------------------------


@functools.cache
def bill():
    return json.loads(run("./dev", "sbom"))


def problems(document):
    """What is wrong with a bill of materials, by the scheme, by Cargo.lock and by the program."""
    invalid = JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(document))
    if invalid:
        yield f"not CycloneDX: {invalid}"
    listed = {(each["name"], each["version"]): each for each in document["components"]}
    packages = tomllib.loads((ROOT / "Cargo.lock").read_text())["package"]
    locked = {(each["name"], each["version"]): each.get("checksum") for each in packages}
    for crate, each in listed.items():
        hashes = [one["content"] for one in each.get("hashes", [])]
        if crate not in locked or hashes != [locked[crate]]:
            yield f"{crate}: Cargo.lock has another one"
        if not each.get("licenses"):
            yield f"{crate}: no licence"
    for crate in in_program() - listed.keys() - of_tests():
        yield f"{crate}: in the program, and not listed"
    for crate in in_program() & listed.keys():
        if listed[crate]["scope"] != "required":
            yield f"{crate}: in the program, and {listed[crate]['scope']}"
    references = {each["bom-ref"] for each in document["components"]}
    references.add(document["metadata"]["component"]["bom-ref"])
    graph = {each["ref"]: each["dependsOn"] for each in document["dependencies"]}
    if graph.keys() != references or not references.issuperset(sum(graph.values(), [])):
        yield "the graph is one of other crates"
    reached, left = set(), [document["metadata"]["component"]["bom-ref"]]
    while left:
        reference = left.pop()
        if reference not in reached:
            reached.add(reference)
            left += graph.get(reference, [])
    yield from (f"{reference}: nothing depends on it" for reference in references - reached)


@functools.cache
def in_program():
    """The crates with code in the program that tests use: their files stand in it, for messages of panics."""
    text = pathlib.Path(harness.binary()).read_bytes()
    found = re.findall(rb"/registry/src/[\w.-]+/([a-zA-Z][\w-]*?)-(\d+\.\d+\.\d+[\w.+-]*)/", text)
    return {(name.decode(), version.decode()) for name, version in found}


def crates(edges):
    """The crates of the tree with these edges."""
    printed = run("cargo", "tree", "--locked", "--prefix", "none", "--format", "{p}", "--edges", edges)
    return set(re.findall(r"^(\S+) v(\S+)", printed, re.MULTILINE))


@functools.cache
def of_tests():
    """The crates that come with tests alone. They are in a program that cargo builds beside the tests."""
    return crates("normal,build,dev") - crates("normal,build")


def test_the_bill_of_materials_is_complete_and_valid():
    assert list(problems(bill())) == []
    assert len(in_program()) > 50
    product = bill()["metadata"]["component"]
    assert (product["name"], product["type"]) == ("vllm-lb", "application")


def test_the_bill_of_materials_is_the_same_each_time():
    assert json.loads(run("./dev", "sbom")) == bill()


def test_what_only_tests_use_is_not_in_the_bill_of_materials():
    names = {each["name"] for each in bill()["components"]}
    unused = tomllib.loads((ROOT / "Cargo.toml").read_text())["dev-dependencies"].keys() - names
    assert {"criterion", "proptest", "tempfile", "rcgen"} <= unused
    # A feature of a dependency that only the benches turn on.
    assert "pingora-proxy" not in names
    scopes = {each["name"]: each["scope"] for each in bill()["components"]}
    assert (scopes["serde_derive"], scopes["serde_core"]) == ("excluded", "required")


def changed(change):
    document = copy.deepcopy(bill())
    change(document)
    return document


def entry(document, name):
    [found] = [each for each in document["components"] if each["name"] == name]
    return found


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found["components"].remove(entry(found, "hyper")),
        lambda found: entry(found, "hyper").update(type="lib"),
        lambda found: entry(found, "hyper")["hashes"][0].update(content="0" * 64),
        lambda found: entry(found, "hyper").pop("licenses"),
        lambda found: entry(found, "hyper").update(scope="excluded"),
        lambda found: found["dependencies"].pop(),
        lambda found: [each["dependsOn"].clear() for each in found["dependencies"]],
    ],
    ids=["a crate", "a type", "a checksum", "a licence", "a scope", "a row of the graph", "the graph"],
)
def test_a_wrong_bill_of_materials_is_found(change):
    assert list(problems(changed(change)))


# ---- source package ----------------------------------------------------------------------------


@functools.cache
def packaged():
    """The files of the package that `cargo publish` would upload, and `cargo install` builds."""
    return set(run("cargo", "package", "--list", "--allow-dirty").split())


def sources():
    """The files of the code, without those of tests alone."""
    for path in (ROOT / "src").rglob("*.rs"):
        if "tests" not in path.parts and not path.stem.endswith("tests"):
            yield path


def included():
    """Files that the code takes into the program."""
    for path in sources():
        code = path.read_text().partition("#[cfg(test)]\nmod tests {")[0]
        for name in re.findall(r'include_(?:str|bytes)!\(\s*"([^"]+)"', code):
            yield (path.parent / name).resolve().relative_to(ROOT)


def test_the_source_package_has_what_a_build_needs():
    found = list(included())
    assert found
    needed = {str(path) for path in found} | {"Cargo.lock", "Cargo.toml", "README.md", "LICENSE"}
    needed |= {str(path.relative_to(ROOT)) for path in sources()}
    assert needed - packaged() == set()
    # jemalloc is built with the settings of this file where cargo sees it: in a checkout.
    assert ".cargo/config.toml" in packaged()


def test_the_source_package_has_nothing_that_a_build_does_not_need():
    folders = {name.split("/")[0] for name in packaged() if "/" in name}
    assert folders == {".cargo", ".config", "conf", "docs", "src"}


def test_the_version_is_the_one_of_the_lock():
    own = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]
    packages = tomllib.loads((ROOT / "Cargo.lock").read_text())["package"]
    assert own["version"] in [each["version"] for each in packages if each["name"] == own["name"]]


def test_the_image_has_the_features_of_a_release():
    steps = yaml.safe_dump(workflows.workflows()["release"]["jobs"]["image"]["steps"])
    assert "./dev features" in steps
    known = tomllib.loads((ROOT / "Cargo.toml").read_text())["features"]
    assert set(run("./dev", "features").strip().split(",")) <= known.keys()


def test_the_chart_runs_the_user_of_the_image():
    dockerfile = (ROOT / "docker/Dockerfile").read_text()
    [user, group] = re.findall(r"^USER (\d+):(\d+)$", dockerfile, re.MULTILINE)[0]
    pod = chart.pod(chart.rendered("default"))["spec"]["securityContext"]
    assert (pod["runAsUser"], pod["runAsGroup"]) == (int(user), int(group))
