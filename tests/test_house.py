"""The house stays as its page draws it: imports run one way, and README and pages are true."""

import ast
import email
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import dmoe_layer
from dmoe_layer import backend, export

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "dmoe_layer"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
WORKS_WITH = (ROOT / "docs" / "start" / "works-with.md").read_text(encoding="utf-8")
HOUSE = (ROOT / "docs" / "explanation" / "house.md").read_text(encoding="utf-8")

STANDARD_OR_CORE = set(sys.stdlib_module_names) | {"torch", "einops", "numpy", "typing_extensions"}


def room(path):
    """The module's name inside the package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def test_imports_between_rooms_run_one_way():
    # The rooms and their order stand in pyproject.toml.
    program = Path(sysconfig.get_path("scripts")) / "lint-imports"
    done = subprocess.run(
        [program, "--no-cache", "--no-logo"], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=room)
def test_the_layer_imports_core_dependencies_only(path):
    others = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level:
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
    if room(path).startswith("fused.") or room(path) == "backend":
        others -= {"triton"}
    if room(path).startswith("export."):
        others -= {"onnx_ir", "onnxruntime", "onnxscript"}
    assert others <= STANDARD_OR_CORE


@pytest.mark.parametrize(
    "path",
    [p for room in ("reference_models", "benchmarks") for p in sorted((ROOT / room).rglob("*.py"))],
    ids=lambda p: f"{p.parent.name}/{p.stem}",
)
def test_reference_models_and_benchmarks_use_public_names_only(path):
    if path.parts[-2:] == ("kernels", "launches.py"):  # which looks at the kernels themselves
        return
    road = "from dmoe_layer.eager.gemm import road"  # by which figures name what computed products
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if path.parts[-2:] == ("benchmarks", "machine.py") and ast.unparse(node) == road:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dmoe_layer"):
            public = {
                "dmoe_layer": dmoe_layer.__all__,
                "dmoe_layer.export": export.__all__,
                "dmoe_layer.surgery": ("add_attribute_value", "remove_attribute_value"),
            }
            assert {alias.name for alias in node.names} <= set(public[node.module])
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("dmoe_layer.") for alias in node.names)


def test_importing_the_package_imports_neither_triton_nor_reference_models_nor_benchmarks():
    # A finder that comes first sees every import that is tried, of what is not installed too.
    code = (
        "import sys, torch\n"
        "class Watch:\n"
        "    def find_spec(name, *_): seen.append(name.split('.')[0])\n"
        "seen = []; sys.meta_path.insert(0, Watch); import dmoe_layer\n"
        "rooms = {'triton', 'onnx', 'onnxscript', 'onnxruntime', 'reference_models', 'benchmarks',"
        " 'monai', 'transformers'}\n"
        "print(sorted(rooms & {*seen}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT, encoding="utf-8"
    )
    assert done.stdout.strip() == "[]"


def test_public_names_are_the_designs_and_each_has_a_docstring():
    assert set(dmoe_layer.__all__) == {
        "DMoE", "AttributeRouter", "Routing", "routing", "carry_routing", "load_balancing_loss",
        "importance_loss", "router_z_loss", "swap_mlps", "insert_after", "MissingAttributesError",
        "window_attributes",
    }  # fmt: skip
    assert all(getattr(dmoe_layer, name).__doc__ for name in dmoe_layer.__all__)
    assert issubclass(dmoe_layer.MissingAttributesError, ValueError)


def snippets(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def side(diff, drop):
    """One side of a unified diff: all lines but those that begin with ``drop``."""
    return "\n".join(line[1:] for line in diff.splitlines() if not line.startswith(drop))


@pytest.mark.parametrize("drop", ["-", "+"])
def test_both_sides_of_the_readme_diff_run(drop):
    (diff,) = snippets("diff")
    namespace = {}
    exec(compile(side(diff, drop), "README.md", "exec"), namespace)
    assert namespace["y"].shape == (2, 196, 64)


def test_readme_names_every_public_name():
    table = README.split("## Public names")[1].split("##")[0]
    named = re.findall(r"^\| `([\w.]+)` \|", table, re.MULTILINE)
    functions = set(export.__all__) - {"OnnxCheck"}  # which export_onnx returns
    expected = {*dmoe_layer.__all__, *(f"export.{name}" for name in functions)}
    expected |= {f"surgery.{name}_attribute_value" for name in ("add", "remove")}
    expected |= {f"backend.{name}" for name in backend.__all__}
    assert sorted(named) == sorted(expected)


def test_readmes_badges_say_what_pyproject_says():
    (badges,) = re.findall(r"^`[^`].*`$", README, re.MULTILINE)
    (python,) = re.findall(r'^requires-python = ">=(.*)"', PROJECT, re.MULTILINE)
    (torch,) = re.findall(r'"torch>=([\d.]+)"', PROJECT)
    (licence,) = re.findall(r'^license = "(.*)"', PROJECT, re.MULTILINE)
    expected = {f"`{licence}`", f"`Python {python} or newer`", f"`PyTorch {torch} or newer`"}
    assert expected <= {f"`{badge}`" for badge in re.findall(r"`(.*?)`", badges)}


def test_every_row_of_works_with_names_a_test():
    rows = [line for line in WORKS_WITH.splitlines() if line.startswith("| ")]
    rows = [line for line in rows if not line.startswith("| feature")]
    assert len(rows) >= 26
    for row in rows:
        links = re.findall(r'blob/main/(tests/[\w/]+\.py) "(test_\w+)"\)', row)
        assert links, row
        for path, name in links:
            assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), name


def test_the_house_draws_every_module():
    for path in PACKAGE.rglob("*.py"):
        assert path.stem == "__init__" or path.name in HOUSE, path.name
    for part in ("reference_models", "benchmarks", "tests"):
        folders = {path.parent.name for path in (ROOT / part).glob("*/*.py")}
        assert {folder for folder in folders - {"harness"} if f"{folder}/" not in HOUSE} == set()
    files = {path.name for path in (ROOT / "reference_models").glob("*.py")} - {"__init__.py"}
    assert {name for name in files if name not in HOUSE} == set()


def test_the_house_lists_the_layers_modules_in_the_order_in_which_they_may_import():
    picture = HOUSE.split("    src/dmoe_layer/\n")[1].split("\n    reference_models/")[0]
    lines = [line.strip() for line in picture.splitlines()]
    drawn = [line.split()[0].rstrip(",").removesuffix(".py").rstrip("/") for line in lines if line]
    contract = PROJECT.split('containers = ["dmoe_layer"]')[1].split("layers = [")[1].split("]")[0]
    floors = [line.strip(' ",').split(" | ") for line in contract.splitlines() if line.strip()]
    floor_of = {room: place for place, rooms in enumerate(floors) for room in rooms}
    places = [floor_of[name] for name in drawn if name in floor_of]
    assert len(places) >= 12
    assert places == sorted(places)


def test_the_wheel_holds_the_package_alone_and_runs_the_readmes_first_snippet(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith("/METADATA")]
        header = email.message_from_bytes(archive.read(metadata))
    assert {n.split("/")[0] for n in names} == {
        "dmoe_layer", f"dmoe_layer-{dmoe_layer.__version__}.dist-info"
    }  # fmt: skip
    assert "dmoe_layer/py.typed" in names
    needs = [n for n in header.get_all("Requires-Dist") if "extra ==" not in n]
    assert {re.match(r"\w+", n).group() for n in needs} == {"torch", "einops", "numpy"}
    # A package index has none of the repository's files beside the README.
    targets = re.findall(r"\]\(([^)]*)\)", header.get_payload())
    ours = "https://github.com/dmoe-layer/dmoe-layer/blob/main/"
    of_files = [target for target in targets if target.startswith(ours)]
    assert len(of_files) > 20
    assert all((ROOT / target.removeprefix(ours).split("#")[0]).exists() for target in of_files)
    picture = "https://raw.githubusercontent.com/dmoe-layer/dmoe-layer/main/"
    assert [t for t in targets if t not in of_files] == [
        f"{picture}reference_models/demo/results/picture.png"
    ]

    # A new environment that holds the wheel; torch, einops and numpy are borrowed by path, which
    # does not bring this checkout along.
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True
    )
    run = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(
        subprocess.run(run, check=True, capture_output=True, encoding="utf-8").stdout.strip()
    )
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    (diff,) = snippets("diff")
    code = side(diff, "-") + "\nimport dmoe_layer; print(dmoe_layer.__file__, tuple(y.shape))"
    # Isolated (-I): this process may be told by PYTHONPATH where the sources are.
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))
    assert done.stdout.strip().endswith("(2, 196, 64)")
