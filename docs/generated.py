"""A hook of MkDocs: pages that commands write into the repository are shown where they lie."""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
# A folder of the repository whose README.md and pictures become a folder of the site.
SHOWN = {
    "benchmarks": "results/benchmarks",
    "reference_models/demo/results": "results/demo",
    "reference_models/study/results": "results/study",
    "reference_models/study/sites/results": "results/sites",
    "reference_models/study/unknown/results": "results/unknown",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds them; the pages are not in the navigation, and others link to them."""
    for folder, place in SHOWN.items():
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".md", ".png"}:
                name = path.relative_to(ROOT / folder).as_posix()
                files.append(File.generated(config, f"{place}/{name}", abs_src_path=str(path)))
    return files


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files, **_: Any
) -> str:
    """Lets their links to files that the site does not show lead to the repository."""
    shown = {str(file.abs_src_path) for file in files}
    source = Path(str(page.file.abs_src_path))

    def link(found: re.Match[str]) -> str:
        target = (source.parent / found[1]).resolve()
        if str(target) in shown or not target.is_relative_to(ROOT):
            return found[0]
        kind = "tree" if target.is_dir() else "blob"
        return f"]({config.repo_url}/{kind}/main/{target.relative_to(ROOT).as_posix()}"

    if not page.file.src_uri.startswith("results/"):
        return markdown
    return re.sub(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", link, markdown)
