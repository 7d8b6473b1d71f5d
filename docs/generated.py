"""A hook of MkDocs: pages that commands write into the repository are shown where they lie."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
# A folder of the repository whose README.md, pictures and csv become a folder of the site.
SHOWN = {
    "benchmarks": "results/benchmarks",
    "reference_models/demo/results": "results/demo",
    "reference_models/study/results": "results/study",
    "reference_models/study/sites/results": "results/sites",
    "reference_models/study/unknown/results": "results/unknown",
}
_LINK = re.compile(r"(?<=\]\()[^)#\s:]+(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds them; the pages are not in the navigation, and others link to them."""
    for folder in SHOWN:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".md", ".png", ".csv"}:
                files.append(File.generated(config, _place(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the repository, as GitHub reads them, into links of the site.

    What the site does not have, such as code and notebooks, is linked to where it lies in the
    repository.
    """
    folder = Path(page.file.abs_src_path or "").parent

    def target(link: re.Match[str]) -> str:
        path = (folder / link[0]).resolve()
        if not path.exists() or ROOT not in path.parents:
            return link[0]
        place = _place(path)
        file = files.get_file_from_path(place)
        if file is None or file.inclusion.is_excluded():
            return f"{config.repo_url}/blob/main/{path.relative_to(ROOT).as_posix()}"
        return posixpath.relpath(place, posixpath.dirname(page.file.src_uri))

    return _LINK.sub(target, markdown)


def _place(path: Path) -> str:
    """Where a file of the repository lies in the site, if it is there at all."""
    name = path.relative_to(ROOT).as_posix()
    for folder, place in {**SHOWN, "docs": "."}.items():
        if name.startswith(f"{folder}/"):
            return posixpath.normpath(f"{place}/{name.removeprefix(f'{folder}/')}")
    return name
