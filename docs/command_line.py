"""A hook of MkDocs: fills the page of the command line with tables of flags, from the commands.

On that page ``<!-- flags: evaluate predictions; not: check -->`` becomes the flags of a command,
without those that are in the tables of other commands.
"""

from __future__ import annotations

import html
import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import tyro
from mkdocs.structure.pages import Page

from reference_models.__main__ import COMMANDS, CONFIG

PAGE = "reference/command-line.md"
# What a table is about, by where the settings are that its flags change.
CAPTIONS = {
    "settings.phantom": "The phantom, a made-up data set",
    "recipe": "The training",
    "recipe.model": "The network",
    "recipe.framing": "What the network sees of a case",
}
_ONE = {"PATH": "a path", "INT": "a whole number", "FLOAT": "a number", "STR": "a text"}
_MORE = {"PATH": "paths", "INT": "whole numbers", "FLOAT": "numbers", "STR": "texts"}


class Flag(NamedTuple):
    """A flag, its default aside: that may be another one for each preset."""

    names: tuple[str, ...]
    takes: str
    meaning: str
    group: str


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Replaces the comments on the page by what they name."""
    if page.file.src_uri != PAGE:
        return markdown
    markdown = re.sub(r"<!-- flags: ([^;]+?)(?:; not: (.+?))? -->", _tables, markdown)
    markdown = re.sub(r"<!-- about: (.+?) -->", lambda found: about(found[1]), markdown)
    return re.sub(r"<!-- presets: (.+?) -->", lambda found: presets(found[1]), markdown)


def _tables(found: re.Match[str]) -> str:
    others = found[2].split(", ") if found[2] else []
    elsewhere = {(flag.names, flag.meaning) for other in others for flag in flags(other)}
    rows: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    defaults = flags(found[1])
    all_presets = tuple(_parsers(found[1]))
    for flag, by_preset in defaults.items():
        if (flag.names, flag.meaning) in elsewhere:
            continue
        same = len(set(by_preset.values())) == 1
        default = next(iter(by_preset.values())) if same else "[by preset](#presets)"
        names = " ".join(f"`{name}`" for name in flag.names)
        row = f"| {names} | {flag.takes} | {default} | {flag.meaning} |"
        rows.setdefault((flag.group, tuple(by_preset)), []).append(row)
    tables = []
    for (group, of), lines in rows.items():
        caption = CAPTIONS.get(group, "")
        if of != all_presets:
            caption += f", with the preset {_listed(of)}"
        head = f"**{caption}.**\n\n" if caption else ""
        tables.append(
            f"{head}| Flag | Takes | Default | Meaning |\n|---|---|---|---|\n" + "\n".join(lines)
        )
    together = "\n\n".join(tables)
    return f'<div class="flags" markdown>\n\n{together}\n\n</div>'


def about(command: str) -> str:
    """What a command does, as `--help` says it; an example becomes a block of code."""
    (parser, *_) = _parsers(command, presets=False).values()
    paragraphs = re.split(r"\n\s*\n", parser.description or "")
    lines = [" ".join(paragraph.split()) for paragraph in paragraphs]
    return "\n\n".join(
        f"```bash\n{line.removeprefix('Example: ')}\n```"
        if line.startswith("Example: ")
        else _escaped(line)
        for line in lines
    )


def presets(command: str) -> str:
    """What each preset is, and where their defaults differ."""
    parsers = _parsers(command)
    lines = ["| Preset | What it trains |", "|---|---|"]
    lines += [f"| `{name}` | {_escaped(p.description)} |" for name, p in parsers.items()]
    lines += [
        "",
        "These defaults differ. A cell is empty if the preset has no such flag, or sets none.",
    ]
    lines += ["", '<div class="presets" markdown>', ""]
    lines += [f"| Flag | {' | '.join(f'`{name}`' for name in parsers)} |"]
    lines += ["|---" * (1 + len(parsers)) + "|"]
    for flag, by_preset in flags(command).items():
        if len(set(by_preset.values())) > 1:
            cells = " | ".join(by_preset.get(name, "") for name in parsers)
            lines.append(f"| `{flag.names[0]}` | {cells} |")
    return "\n".join([*lines, "", "</div>"])


def flags(command: str) -> Mapping[Flag, Mapping[str, str]]:
    """The flags of a command, each with its default by preset (one preset, "", if it has none)."""
    found: dict[Flag, dict[str, str]] = {}
    for preset, parser in _parsers(command).items():
        for action in parser._actions:
            if action.option_strings and "--help" not in action.option_strings:
                text, default = _meaning_and_default(action.help)
                switch = len(action.option_strings) > 1
                if switch:
                    default = {"True": "on", "False": "off"}[default]
                elif default not in ("", "required"):
                    default = f"`{default}`"
                group = action.dest.rpartition(".")[0]
                takes = "nothing" if switch else _takes(action)
                flag = Flag((*action.option_strings,), takes, text, group)
                found.setdefault(flag, {})[preset] = default
    return found


def _parsers(command: str, presets: bool = True) -> dict[str, Any]:
    """The parser of a command by name; of one that has presets, that of each."""
    name, *rest = command.split()
    with warnings.catch_warnings():
        # A later version of tyro will drop it, but nothing else knows the flags yet.
        warnings.simplefilter("ignore", DeprecationWarning)
        parser: Any = tyro.extras.get_parser(COMMANDS[name], config=CONFIG)
    for part in rest:
        parser = _choices(parser)[part]
    return (presets and _choices(parser)) or {"": parser}


def _choices(parser: Any) -> dict[str, Any]:
    found = [action.choices for action in parser._actions if hasattr(action.choices, "items")]
    return dict(found[0]) if found else {}


def _meaning_and_default(text: str) -> tuple[str, str]:
    """The two parts of a flag's help, for a cell of a table. None is no default to show."""
    found = re.fullmatch(r"(.*?)\s*\((?:default: ([^()]*)|(required))\)", text.strip(), re.DOTALL)
    if found is None:
        raise ValueError(f"help of a flag: got {text!r}, expected its default at the end.")
    items = re.split(r"\n\s*(?=- )", found[1])
    meaning = "<br>".join(_escaped(" ".join(item.split())) for item in items)
    default = found[3] or " ".join(found[2].split())
    return meaning, "" if default == "None" else default


def _takes(action: Any) -> str:
    """What comes behind a flag, from how `--help` writes it, such as {None}|{[INT [INT ...]]}."""
    if action.choices:
        return ", ".join(f"`{choice}`" for choice in action.choices if choice != "None")
    kinds = []
    for part in re.split(r"\|(?![^{]*\})", action.metavar):
        part = part.strip("{}")
        words = set(re.findall(r"[A-Z]{3,}", part))
        if "..." in part:
            kinds = [kind for kind in kinds if kind not in _ONE.values()]
            kinds.append(_MORE[words.pop()])
        elif part in _ONE:
            kinds.append(_ONE[part])
        elif words:
            kinds.append(f"{len(part.split())} {_MORE[words.pop()]}")
        elif part != "None":
            kinds += [f"`{choice}`" for choice in part.split(",")]
    return " or ".join(kinds)


def _escaped(text: str) -> str:
    """A text for Markdown's tables; what stands in backticks stays as it is."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([_*|\[\]])", r"\\\1", html.escape(p, quote=False)) for p in parts[::2]]
    return "`".join(parts)


def _listed(names: tuple[str, ...]) -> str:
    *first, last = (f"`{name}`" for name in names)
    return f"{', '.join(first)} or {last}" if first else last
