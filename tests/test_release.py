"""A release is refused unless tag, version, citation and changelog agree; workflows are valid."""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import dmoe_layer

ROOT = Path(__file__).parent.parent
VERSION = "src/dmoe_layer/_version.py"
HEADING = re.compile(rf"^## \[{re.escape(dmoe_layer.__version__)}\] - (.*)$", flags=re.MULTILINE)


@pytest.fixture
def release(tmp_path):
    """Changes a file of a copy, and gives exit code and text of the check of a tag."""
    for name in (".ci/release.py", VERSION, "CITATION.cff", "CHANGELOG.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)

    def check(tag, name=None, old="", new=""):
        if name:
            text = (tmp_path / name).read_text(encoding="utf-8")
            assert old in text
            (tmp_path / name).write_text(text.replace(old, new), encoding="utf-8")
        command = [sys.executable, tmp_path / ".ci/release.py", *([tag] if tag else [])]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        assert not done.stderr
        return done.returncode, done.stdout

    return check


def test_the_tag_of_the_version_may_be_released(release):
    tag = f"v{dmoe_layer.__version__}"
    assert release(tag) == (0, f"{tag} may be released.\n")


@pytest.mark.parametrize("tag", ["0.2.0", "v0.2", "v0.2.0rc1", "v9.9.9", "v"])
def test_another_tag_is_refused(release, tag):
    code, said = release(tag)
    assert code == 1
    assert said == (
        f"The tag is {tag}, but _version.py says {dmoe_layer.__version__}: "
        f"expected v{dmoe_layer.__version__}.\n"
    )


def test_no_tag_is_refused(release):
    code, said = release(None)
    assert code == 2
    assert "which tag" in said


def test_a_version_that_only_the_tag_and_the_package_have_is_refused(release):
    code, said = release("v9.9.9", VERSION, dmoe_layer.__version__, "9.9.9")
    assert code == 1
    assert "CITATION.cff says version" in said
    assert "CHANGELOG.md has 0 sections of 9.9.9" in said


@pytest.mark.parametrize("date", ["unreleased", "30.11.2026", "2026-13-01", ""])
def test_a_changelog_without_a_date_of_the_version_is_refused(release, date):
    (heading,) = HEADING.finditer((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    new = heading[0].replace(heading[1], date)
    code, said = release(f"v{dmoe_layer.__version__}", "CHANGELOG.md", heading[0], new)
    assert code == 1
    assert "has the date" in said


def schema_check(schema, *paths):
    program = Path(sysconfig.get_path("scripts")) / "check-jsonschema"
    command = [program, "--builtin-schema", schema, *paths]
    return subprocess.run(command, capture_output=True, encoding="utf-8")


@pytest.mark.parametrize(
    ("schema", "paths"),
    [
        ("vendor.github-workflows", sorted((ROOT / ".github/workflows").glob("*.yml"))),
        ("custom.github-workflows-require-timeout", [*(ROOT / ".github/workflows").glob("*.yml")]),
        ("vendor.dependabot", [ROOT / ".github/dependabot.yml"]),
        ("vendor.citation-file-format", [ROOT / "CITATION.cff"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_for_other_programs_fit_their_published_schemas(schema, paths):
    done = schema_check(schema, *paths)
    assert paths
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_workflow_that_does_not_fit_the_schema_is_found(tmp_path):
    text = (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
    (tmp_path / "release.yml").write_text(
        text.replace("id-token: write", "id-token: all"), encoding="utf-8"
    )
    done = schema_check("vendor.github-workflows", tmp_path / "release.yml")
    assert done.returncode == 1, done.stdout + done.stderr


def test_the_release_checks_the_tag_first_and_stores_no_token():
    text = (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
    assert text.index(".ci/release.py") < text.index("make wheel") < text.index("pypi-publish")
    assert "needs: build" in text
    assert "id-token: write" in text
    assert not re.search("secrets|password|TOKEN", text)


def test_make_targets_of_the_workflows_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        for target in re.findall(r"\bmake (\w+)", path.read_text(encoding="utf-8")):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), (path.name, target)
