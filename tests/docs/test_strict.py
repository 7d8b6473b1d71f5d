"""What fails the build beside MkDocs' own checks: names without text or page, and foreign hosts."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import dmoe_layer
from docs import strict

DOCS = Path(__file__).parent.parent.parent / "docs"
PUBLIC = {name: value for module in strict.MODULES for name, value in strict.public(module)}


def test_methods_and_properties_of_public_classes_are_public():
    assert PUBLIC.keys() >= {
        "dmoe_layer.DMoE.forward",
        "dmoe_layer.DMoE.from_mlp",
        "dmoe_layer.routing.routings",
        "dmoe_layer.routing.attribute_values",
        "dmoe_layer.surgery.add_attribute_value",
        "dmoe_layer.export.OnnxCheck",
        "dmoe_layer.backend.explain",
    }
    assert {f"dmoe_layer.{name}" for name in dmoe_layer.__all__} <= PUBLIC.keys()


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring_and_is_on_a_page(name):
    assert strict.has_docstring(PUBLIC[name])
    pages = "\n".join(p.read_text(encoding="utf-8") for p in (DOCS / "reference").glob("*.md"))
    owner, _, member = name.rpartition(".")
    if owner not in PUBLIC:
        assert re.search(rf"^::: {re.escape(name)}$", pages, re.MULTILINE)
        return
    # The members that a page names, or all of them.
    options = re.search(rf"^::: {re.escape(owner)}\n((?:    .*\n)*)", pages, re.MULTILINE)[1]
    named = re.search(r"members: \[(.*)\]", options)
    assert named is None or member in named[1].split(", ")


class WithoutDocstring:
    def method(self):
        """It has one."""

    def other(self):
        pass


def test_a_name_without_a_docstring_is_found():
    module = SimpleNamespace(__name__="made", __all__=["Made"], Made=WithoutDocstring)
    found = {name: strict.has_docstring(value) for name, value in strict.public(module)}
    assert found == {"made.Made": False, "made.Made.method": True, "made.Made.other": False}


@pytest.mark.parametrize(
    "page",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/css">',
        '<link href="https://fonts.example" rel="preconnect">',
        '<img src="http://shields.example/badge.svg">',
        '<p style="background: url(https://a.example/b.png)">',
        "<style>@import 'https://a.example/b.css';</style>",
    ],
)
def test_what_a_page_loads_from_another_host_is_found(page):
    assert len(strict.loaded_from_elsewhere(page)) == 1


def test_links_and_files_of_the_site_are_no_load_from_another_host():
    page = (
        '<a href="https://arxiv.org/abs/2502.00619">paper</a><script src="../a.js"></script>'
        '<link rel="canonical" href="https://dmoe.example/"><img src="data:image/png;base64,AA">'
    )
    assert strict.loaded_from_elsewhere(page) == []
