"""What README.md and the pages of docs/ show runs as it stands, and prints what they say."""

import contextlib
import doctest
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OURS = "https://github.com/dmoe-layer/dmoe-layer/blob/main/"


def blocks(page, language):
    """The fenced blocks of a language, without the indent that a tab or an admonition gives."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(rf"^( *)```{language}[^\n]*\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def name(page):
    return page.relative_to(ROOT).as_posix()


# Pages whose examples need a trained run or nnU-Net; the tests there run them.
RUN_BY = {
    "docs/recipes/export.md": "tests/reference/export/test_exported_images.py",
    "docs/recipes/nnunet.md": "tests/harness/nnunet_home.py",
}


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page, "python") and name(page) not in RUN_BY],
    ids=name,
)
def test_the_examples_of_a_page_run_and_print_what_their_comments_say(page, tmp_path, monkeypatch):
    """Blocks run one after another, as a reader types them; `print(...)  # this` prints this."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    checker = doctest.OutputChecker()
    for block in blocks(page, "python"):
        said = re.findall(r"^ *print\(.*\)  # (.*)$", block, re.MULTILINE)
        assert len(said) == len(re.findall(r"^ *print\(", block, re.MULTILINE)), (
            f"every print says what it prints: {block}"
        )
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, name(page), "exec"), namespace)
        expected = "".join(f"{line}\n" for line in said)
        got = printed.getvalue()
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        assert checker.check_output(expected, got, flags), f"{block}\nprints\n{got}"


@pytest.mark.parametrize("page", RUN_BY)
def test_the_examples_that_run_elsewhere_are_read_there(page):
    assert Path(page).name in (ROOT / RUN_BY[page]).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_make_targets_of_a_page_are_there(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\bmake ([a-z][\w-]*)\b", "\n".join(blocks(page, "bash"))):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for target in re.findall(r"`make ([a-z][\w-]*)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name)
def test_the_links_of_a_page_lead_somewhere_in_the_repository(page):
    """As one follows them on GitHub. MkDocs looks at those of the site, and at their headings."""
    for link in re.findall(r"\]\(([^)\s]+)", page.read_text(encoding="utf-8")):
        path, _, heading = link.partition("#")
        if ":" in path or not path:
            continue
        target = page.parent / path
        assert target.is_file(), link
        if heading and page.parent == ROOT:
            assert heading in anchors(target), link


def anchors(page):
    """Of every heading, the end of the address that leads to it."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_links_of_a_page_into_the_repository_lead_somewhere(page):
    for path in re.findall(rf"{re.escape(OURS)}([^)\s#]+)", page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), path
