"""A hook of MkDocs: further reasons to fail the build.

A public name must have a docstring and be on a page, and no page may load from another host.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from types import ModuleType
from typing import Any

from mkdocs.config.defaults import MkDocsConfig

import dmoe_layer
import dmoe_layer.backend
import dmoe_layer.export
import dmoe_layer.surgery

MODULES = (dmoe_layer, dmoe_layer.export, dmoe_layer.surgery, dmoe_layer.backend)
# Methods that PyTorch or the layer calls, and not a user.
INTERNAL = {"extra_repr", "initialize_parameters", "values_of"}

log = logging.getLogger("mkdocs.hooks.strict")  # in strict mode a warning fails the build


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The names of a module's `__all__`, and the public methods and properties of its classes."""
    for name in module.__all__:
        value = getattr(module, name)
        yield f"{module.__name__}.{name}", value
        for member, found in vars(value).items() if inspect.isclass(value) else ():
            methods = (property, classmethod, staticmethod)
            is_method = inspect.isfunction(found) or isinstance(found, methods)
            if is_method and not member.startswith("_") and member not in INTERNAL:
                yield f"{module.__name__}.{name}.{member}", getattr(value, member)


def has_docstring(value: Any) -> bool:
    """Whether it has one of its own: Python itself writes that of a named tuple's class."""
    text = value.__doc__ or ""
    return bool(text) and not text.startswith(f"{getattr(value, '__name__', '')}(")


class _Loaded(HTMLParser):
    """Collects the addresses from which a browser loads a part of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        links = tag == "link" and given.get("rel") not in ("canonical", "next", "prev", "alternate")
        named = ["src", "srcset", "poster", "data"] + ["href"] * (links or tag in ("use", "image"))
        self.addresses += [given[name] for name in named if name in given]
        self.addresses += re.findall(r"url\(['\"]?([^'\")]+)", given.get("style", ""))

    def handle_data(self, data: str) -> None:
        if self.get_starttag_text() == "<style>":
            self.addresses += re.findall(r"(?:url\(|@import )['\"]?([^'\")]+)", data)


def loaded_from_elsewhere(page: str) -> list[str]:
    """The addresses on other hosts from which a page loads something; links to click are none."""
    parser = _Loaded()
    parser.feed(page)
    return [address for address in parser.addresses if re.match(r"(https?:)?//", address)]


def on_post_page(output: str, page: Any, config: MkDocsConfig) -> str:
    """Looks at every page's HTML."""
    for address in loaded_from_elsewhere(output):
        log.warning("%s loads %s from another host", page.file.src_uri, address)
    return output


def on_env(env: Any, config: MkDocsConfig, files: Any) -> Any:
    """Looks at all public names, once all pages are there."""
    anchors: Any = config.plugins["autorefs"]
    for module in MODULES:
        for name, value in public(module):
            if not has_docstring(value):
                log.warning("%s has no docstring", name)
            try:
                anchors.get_item_url(name)
            except KeyError:
                log.warning("%s is on no page", name)
    return env
