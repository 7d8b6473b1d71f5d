"""Whether a tag may be released: `python .ci/release.py v0.2.0`.

The tag has to be v and the version in _version.py. CITATION.cff has to name the same version, and
CHANGELOG.md has to have a section of it with a date. Prints what is wrong; needs no package.
"""

from __future__ import annotations

import re
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent


def refusals(tag: str) -> list[str]:
    """What stands against the release of this tag, in sentences."""
    found: list[str] = []
    version = _only(r'^__version__ = "(.+)"$', "src/dmoe_layer/_version.py")
    if tag != f"v{version}":
        found.append(f"The tag is {tag}, but _version.py says {version}: expected v{version}.")
    cited = _only(r"^version: (.+)$", "CITATION.cff")
    if cited != version:
        found.append(f"CITATION.cff says version {cited}, but _version.py says {version}.")
    heading = rf"^## \[{re.escape(version)}\](?: - (.*))?$"
    sections = re.findall(heading, _read("CHANGELOG.md"), flags=re.MULTILINE)
    if len(sections) != 1:
        found.append(f"CHANGELOG.md has {len(sections)} sections of {version}, expected one.")
    elif not _is_date(sections[0]):
        found.append(
            f"CHANGELOG.md: the heading of {version} has the date '{sections[0]}', expected one "
            "such as 2026-11-30."
        )
    return found


def _read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def _only(pattern: str, path: str) -> str:
    """The one place of a file where the pattern matches."""
    (match,) = re.findall(pattern, _read(path), flags=re.MULTILINE)
    return str(match)


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("Say which tag: python .ci/release.py v0.2.0")
        return 2
    found = refusals(arguments[0])
    print("\n".join(found) or f"{arguments[0]} may be released.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
