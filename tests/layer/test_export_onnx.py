"""ONNX files: what they compute in onnxruntime, what they refuse, and what of them is refused."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from harness.exports import run_without_package
from harness.layers import make_quiet, make_x
from helpers import GOOD, A, D
from onnxruntime.quantization import quantize_dynamic
from torch import nn

import dmoe_layer
from dmoe_layer import DMoE, routing
from dmoe_layer.export import export_onnx, trials, with_attributes
from dmoe_layer.export import onnx as writing

TWO = {"n_experts": 2, "k": 1}  # each expert is some operators that torch.onnx takes its time for
both_forms = pytest.mark.parametrize("form", ["sparse", "dense"])


def session(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # of the runs that shall fail
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(opened, x, attributes):
    inputs = {"image": x.numpy(), "attribute": attributes.numpy()}
    return [torch.from_numpy(y) for y in opened.run(None, inputs)]


def wrong_value():
    return pytest.raises(Exception, match="indices element out of data bounds")


class Host(nn.Module):
    """Several attributes and activations, channels first."""

    def __init__(self, unknown):
        super().__init__()
        options = {"attribute_sizes": (3, 2), "unknown": unknown, "channel_dim": 1, "n_experts": 3}
        self.first = make_quiet(activation="geglu", residual=True, **options)
        self.second = make_quiet(activation="gelu_tanh", bias=False, k=1, **options)

    def forward(self, x):
        return {"maps": self.second(self.first(x)), "pooled": (x.mean((2, 3)), None)}


PAIRS = torch.tensor([[2, 1], [0, 0]])


@pytest.fixture(scope="module", params=["sparse", "dense"])
def written(request, tmp_path_factory):
    """(a host, its file, what was found)"""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    host, x = Host("learned").eval(), torch.randn(2, 6, 3, 5)
    path.write_text("an older file, which is replaced", encoding="utf-8")
    found = export_onnx(
        host,
        path,
        x,
        PAIRS,
        dynamic_axes=(0, 2, 3),
        experts=request.param,
        attribute_values={"site": ["Oslo", "Łódź", "Paris"], "sex": ["f", "m"]},
        metadata={"recipe": "small"},
    )
    return host, path, found


def test_a_file_gives_what_the_model_gives_at_sizes_it_was_not_shown(written):
    host, path, _ = written
    opened = session(path)
    assert [each.name for each in opened.get_inputs()] == ["image", "attribute"]
    assert opened.get_inputs()[0].shape == ["batch", 6, "size_2", "size_3"]
    assert [each.name for each in opened.get_outputs()] == ["maps", "pooled_0"]
    for batch, height, width in ((1, 3, 5), (5, 1, 7), (4, 6, 2)):
        x = torch.randn(batch, 6, height, width)
        pairs = torch.stack([torch.arange(batch) % 4 - 1, torch.arange(batch) % 3 - 1], dim=1)
        with routing(pairs):
            expected = host(x)
        maps, pooled = run(opened, x, pairs)
        torch.testing.assert_close(maps, expected["maps"])
        torch.testing.assert_close(pooled, expected["pooled"][0])


def test_a_file_says_how_far_it_is_from_the_model(written):
    _, _, found = written
    # The example; in batches of 1, 3 and 1, four values of an attribute; two further axes.
    assert found.runs == 1 + 2 + 2
    assert 0 < found.largest_difference < 1e-5


def test_a_file_refuses_wrong_values_of_each_attribute(written):
    _, path, _ = written
    opened, x = session(path), torch.randn(2, 6, 3, 5)
    for wrong in ([3, 0], [0, 2], [-2, 0], [0, -2], [2**40, 0]):
        with wrong_value():
            run(opened, x, torch.tensor([[0, 0], wrong]))


def test_a_file_takes_one_row_for_all_samples_as_a_layer_does_and_no_other_number(written):
    host, path, _ = written
    opened, x = session(path), torch.randn(4, 6, 3, 5)
    with routing(PAIRS[:1]):
        expected = host(x)["maps"]
    torch.testing.assert_close(run(opened, x, PAIRS[:1])[0], expected)
    for samples, rows in ((4, 2), (4, 3), (4, 5), (1, 2)):
        with pytest.raises(Exception, match=r"(Expand|Reshape) node"):
            run(opened, x[:samples], torch.zeros(rows, 2, dtype=torch.int64))


def test_a_nan_in_one_sample_stays_there(written):
    _, path, _ = written
    opened, x = session(path), torch.randn(2, 6, 3, 5)
    clean = run(opened, x, PAIRS)[0]
    x[1] = torch.nan
    found = run(opened, x, PAIRS)[0]
    torch.testing.assert_close(found[0], clean[0])
    assert found[1].isnan().all()


def test_a_file_has_onnxs_own_operators_and_tells_what_it_is_and_nothing_of_its_maker(written):
    _, path, _ = written
    assert b".py" not in path.read_bytes()
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert {(each.domain, each.version) for each in proto.opset_import if not each.domain} == {
        ("", 18)
    }
    assert {node.domain for node in proto.graph.node} == {""}
    told = session(path).get_modelmeta().custom_metadata_map
    assert told["recipe"] == "small"
    assert told["dmoe_layer.version"] == dmoe_layer.__version__
    assert told["torch.version"] == torch.__version__
    assert json.loads(told["dmoe_layer.attributes"]) == [
        {"name": "site", "size": 3, "values": ["Oslo", "Łódź", "Paris"], "unknown": "learned"},
        {"name": "sex", "size": 2, "values": ["f", "m"], "unknown": "learned"},
    ]


def test_a_file_runs_where_there_is_no_torch(written, tmp_path):
    host, path, _ = written
    x, pairs = torch.randn(3, 6, 2, 4), torch.tensor([[1, 0], [-1, 1], [2, -1]])
    with routing(pairs):
        expected = host(x)["maps"].detach().numpy()
    np.savez(tmp_path / "case.npz", image=x, attribute=pairs, expected=expected)
    code = """
import numpy as np, onnxruntime
path, case = argv
case = np.load(case)
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
maps = session.run(["maps"], {name: case[name] for name in ("image", "attribute")})[0]
print(np.abs(maps - case["expected"]).max() < 1e-5)
"""
    said = run_without_package(code, path, tmp_path / "case.npz", modules=["torch"])
    assert said.strip() == "True"


@both_forms
@pytest.mark.parametrize("unknown", ["error", "average"])
def test_unknown_does_what_the_layer_says(form, unknown, tmp_path):
    layer, x = make_quiet(unknown=unknown, **TWO).eval(), make_x()
    # A batch of one, which torch.export alone would fix, and a value for all samples.
    export_onnx(layer, tmp_path / "m.onnx", x[:1], 2, experts=form)
    opened = session(tmp_path / "m.onnx")
    attributes = torch.tensor([0, -1, 2, 1])
    if unknown == "error":
        with wrong_value():
            run(opened, x, attributes)
    else:
        torch.testing.assert_close(run(opened, x, attributes)[0], layer(x, attributes).detach())
    for wrong in (A, -2):
        with wrong_value():
            run(opened, x, torch.tensor([0, wrong, 2, 1]))


def test_where_a_runtime_does_not_look_at_indices_the_sample_is_nan(tmp_path):
    layer, x, path = make_quiet().eval(), make_x(), tmp_path / "m.onnx"
    export_onnx(with_attributes(layer, experts="dense"), path, x, GOOD)
    proto = onnx.load(path)
    graph = proto.graph
    assert not any(node.op_type == "NonZero" for node in graph.node)
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(A - 1), "highest"))
    tables = {each.name for each in graph.initializer if each.dims and each.dims[0] == A}
    picks = [n for n in graph.node if n.op_type == "Gather" and n.input[0] in tables]
    assert len(picks) == 2  # weights and biases of the sample's router
    for i, node in enumerate(picks):
        clamp = onnx.helper.make_node("Min", [node.input[1], "highest"], [f"clamped_{i}"])
        graph.node.insert(list(graph.node).index(node), clamp)
        node.input[1] = f"clamped_{i}"
    onnx.save(proto, path)
    (found,) = run(session(path), x, torch.tensor([0, -1, 1, A]))
    assert found[[1, 3]].isnan().all()
    torch.testing.assert_close(found[[0, 2]], layer(x, torch.tensor([0, 0, 1, 0]))[[0, 2]].detach())


def test_eight_bit_weights_by_onnxruntime_are_near(tmp_path):
    model = nn.Sequential(nn.Linear(8, 32), DMoE(32, n_experts=2, k=1, attribute_sizes=A)).eval()
    x = torch.randn(4, 20, 8)
    export_onnx(model, tmp_path / "m.onnx", x, GOOD)
    quantize_dynamic(tmp_path / "m.onnx", tmp_path / "int8.onnx")
    sizes = [(tmp_path / name).stat().st_size for name in ("m.onnx", "int8.onnx")]
    assert sizes[1] < 0.5 * sizes[0]
    (found,) = run(session(tmp_path / "int8.onnx"), x, GOOD)
    expected = with_attributes(model)(x, GOOD).detach()
    off_T = (found - expected).abs().amax(-1).flatten() / expected.abs().max()
    # One token in a hundred or so may go to another expert, and be off by any amount.
    assert 0 < off_T.quantile(0.9) < 0.02
    with wrong_value():
        run(session(tmp_path / "int8.onnx"), x, torch.tensor([0, 1, 2, A]))


def test_a_model_without_attributes_is_a_file_of_one_input(tmp_path):
    plain = make_quiet(attribute_sizes=None, **TWO).eval()
    export_onnx(plain, tmp_path / "m.onnx", make_x())
    opened, x = session(tmp_path / "m.onnx"), make_x(batch=3)
    (found,) = opened.run(None, {"image": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), plain(x).detach())
    with pytest.raises(ValueError, match=r"no layer of the model has attribute_sizes.*Pass None"):
        export_onnx(plain, tmp_path / "m.onnx", make_x(), GOOD)


def nothing_there(path):
    return sorted(each.name for each in path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"dynamic_axes": (0, 3)}, ValueError, r"dynamic_axes: got 3, expected .* 0 \.\. 2"),
        ({"opset": 17}, ValueError, "opset: got 17, expected at least 18"),
        ({"experts": "all"}, ValueError, "experts: got 'all'"),
        ({"path": None}, TypeError, r"path: got None \(NoneType\)"),
        ({"x": make_x().bfloat16()}, ValueError, r"x: got torch\.bfloat16.*x\.float\(\)"),
        ({"x": [1.0]}, TypeError, r"x: got \[1.0\]"),
        ({"attributes": None}, dmoe_layer.MissingAttributesError, "attributes: got none"),
        ({"attributes": torch.tensor([0, 9, 0, 0])}, ValueError, "got 9"),
        ({"attribute_values": {"site": ["a", "b"]}}, ValueError, r"got \{'site': 2\}.*\[3\]"),
        ({"attribute_values": ["a", "b", "c"]}, TypeError, r"got \['a'.*\{\"site\""),
        ({"attribute_values": {"site": "abc"}}, TypeError, "got 'site': 'abc'.* list of texts"),
        ({"attribute_values": {"site": [1, 2, 3]}}, TypeError, r"got 'site': \[1, 2, 3\]"),
        ({"attribute_values": {"site": ["a", "b", "a"]}}, ValueError, "a different text"),
        ({"dynamic_axes": 0}, TypeError, r"dynamic_axes: got 0 \(int\)"),
        ({"tolerance": "1e-3"}, ValueError, "tolerance: got '1e-3'"),
        ({"tolerance": float("nan")}, ValueError, "tolerance: got nan"),
        ({"metadata": [("a", "b")]}, TypeError, r"metadata: got \[\('a'"),
        ({"metadata": {"torch.version": "1"}}, ValueError, "metadata: got 'torch.version'"),
        ({"metadata": {"a": 1}}, ValueError, "metadata: got 'a': 1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path, changes, error, words):
    inputs = {"path": tmp_path / "m.onnx", "x": make_x(), "attributes": GOOD, **changes}
    with pytest.raises(error, match=words):
        export_onnx(make_quiet().eval(), **inputs)
    assert nothing_there(tmp_path)


def test_a_model_that_is_not_ready_is_refused(tmp_path):
    model = nn.Sequential(make_quiet(), nn.Dropout()).eval()
    model[1].train()
    with pytest.raises(ValueError, match=r"model: 1 is in training mode.*model\.eval\(\)"):
        export_onnx(model, tmp_path / "m.onnx", make_x(), GOOD)
    with pytest.raises(ValueError, match=r"noise='always'"):
        export_onnx(make_quiet(noise="always").eval(), tmp_path / "m.onnx", make_x(), GOOD)
    half = make_quiet().eval().bfloat16()
    with pytest.raises(ValueError, match=r"w1_EHD is torch\.bfloat16.*deepcopy\(model\)\.float"):
        export_onnx(half, tmp_path / "m.onnx", make_x(), GOOD)
    mixed = nn.Sequential(make_quiet(), nn.Linear(D, 2)).eval()
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"its output is torch\.bfloat16.*torch\.autocast"),
    ):
        export_onnx(mixed, tmp_path / "m.onnx", make_x(), GOOD)
    assert nothing_there(tmp_path)


def test_a_folder_that_nothing_can_be_written_to_is_refused_before_the_export(
    tmp_path, monkeypatch
):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(writing, "_export", lambda *_: pytest.fail("it was exported"))
    with pytest.raises(ValueError, match=r"path: got .*expected a file in a folder that exists"):
        export_onnx(make_quiet().eval(), tmp_path / "no" / "m.onnx", make_x(), GOOD)
    monkeypatch.setattr(writing.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match=r"m\.onnx', .*cannot be written to \(Permission denied\)"):
        export_onnx(make_quiet().eval(), tmp_path / "m.onnx", make_x(), GOOD)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, package):
    found = writing.find_spec
    monkeypatch.setattr(writing, "find_spec", lambda n: None if n == package else found(n))
    with pytest.raises(
        ImportError, match=rf"not installed: {package}\. .*pip install '\.\[export\]'"
    ):
        export_onnx(make_quiet().eval(), tmp_path / "m.onnx", make_x(), GOOD)


def test_a_file_that_differs_or_lets_wrong_values_pass_is_not_written(tmp_path, monkeypatch):
    layer, x, path = make_quiet(**TWO).eval(), make_x(), tmp_path / "m.onnx"
    path.write_text("what stood there", encoding="utf-8")
    monkeypatch.setattr(trials, "_difference", lambda *_: 2e-3)
    with pytest.raises(RuntimeError, match=r"differs from the model by 2\.0e-03.*tolerance=0\.001"):
        export_onnx(layer, path, x, GOOD)
    monkeypatch.undo()
    # As the released code does, and an exporter that knows nothing of this: -1 is the last row.
    monkeypatch.setattr(dmoe_layer.attributes, "NOWHERE", -1)
    monkeypatch.setattr("dmoe_layer.router.AttributeRouter._rows", lambda _, values_BN: values_BN)
    with pytest.raises(RuntimeError, match=r"the file accepted the attributes \[(-1|3), 2, 1, 2\]"):
        export_onnx(layer, path, x, GOOD)
    monkeypatch.undo()
    assert [each.name for each in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_text(encoding="utf-8") == "what stood there"


def test_the_package_imports_without_onnx():
    names = "'onnx', 'onnxruntime', 'onnxscript'"
    code = f"import sys, dmoe_layer.export; print(sorted({{{names}}} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.stdout.strip() == "[]", done.stderr


def test_an_opset_that_torch_does_not_write_is_refused(tmp_path, monkeypatch):
    older = SimpleNamespace(model=SimpleNamespace(opset_imports={"": 20}))
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: older)
    with pytest.raises(ValueError, match=r"opset: got 99, but torch\.onnx wrote .* in 20"):
        export_onnx(make_quiet(**TWO).eval(), tmp_path / "m.onnx", make_x(), GOOD, opset=99)
    assert nothing_there(tmp_path)


def test_differences_are_relative_to_the_largest_value_and_nans_must_agree():
    true = np.array([[4.0, np.nan], [0.0, 1.0]])
    assert trials._difference(true + 1, true) == 0.25
    assert trials._difference(np.zeros_like(true), true) == np.inf
    assert trials._difference(true, np.zeros_like(true)) == np.inf
    assert trials._difference(np.zeros(3), true) == np.inf
    assert trials._difference(np.full(2, 0.5), np.zeros(2)) == 0.5
    assert trials._difference(np.zeros((0, 2)), np.zeros((0, 2))) == 0
