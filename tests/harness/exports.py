"""Layers that compute as an exported program does, and programs run where this package is not."""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dmoe_layer import attributes, backend, router
from dmoe_layer.aten import expert_form
from dmoe_layer.export import with_attributes

OPEN = torch.export.Dim.DYNAMIC


@contextmanager
def as_exported(form):
    """Layers called inside compute by what an exported program is made of, in this process."""
    with pytest.MonkeyPatch.context() as patch, expert_form(form):
        for module in (attributes, backend, router):
            patch.setattr(module, "exporting", lambda: True)
        yield


def exported(model, x, attributes, *, axes=(0,), strict=False, **options):
    """The model's ``torch.export`` program of (x, attributes), with these axes of x open."""
    shapes = dict.fromkeys(axes, OPEN)
    return torch.export.export(
        with_attributes(model, **options),
        (x, attributes),
        dynamic_shapes=(shapes, {0: OPEN} if 0 in axes else {}),
        strict=strict,
    )


def operators(program):
    """The names of all operators in a program, those of blocks inside of it too."""
    return {
        str(node.target)
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_function"
    }


# In isolated mode Python looks neither at PYTHONPATH nor at the folder it stands in; where the
# package is installed, a finder refuses it.
_WITHOUT_PACKAGE = """
import sys
class Refuse:
    def find_spec(name, *_):
        if name.split(".")[0] in {"dmoe_layer", *sys.argv[2].split(",")}:
            raise ImportError(name + " is refused")
sys.meta_path.insert(0, Refuse)
sys.path[:0] = sys.argv[3].split(chr(10))
exec(sys.argv[1])
"""


def run_without_package(code, *arguments, modules=(), expect=0):
    """Runs ``code`` in a new process, where neither this package nor ``modules`` can be imported.

    ``argv`` is a list of the further arguments there. Gives back what was written to stdout, and to
    stderr where it shall fail.
    """
    paths = "\n".join(p for p in sys.path if p and not Path(p, "dmoe_layer").exists())
    code = f"argv = sys.argv[4:]\n{code}"
    done = subprocess.run(
        [sys.executable, "-I", "-c", _WITHOUT_PACKAGE, code, ",".join(modules), paths]
        + [str(argument) for argument in arguments],
        capture_output=True,
        encoding="utf-8",
    )
    assert (done.returncode == 0) is (expect == 0), done.stderr
    return done.stdout if expect == 0 else done.stderr
