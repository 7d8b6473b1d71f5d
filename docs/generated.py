"""A hook of MkDocs: pages that commands write into the repository are shown where they lie."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

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
