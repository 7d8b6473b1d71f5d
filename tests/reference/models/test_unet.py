"""The small U-Net computes what it says, whatever stands in the place of its MLPs."""

import copy
import math
import re

import pytest
import torch
from harness.unets import KNOWN, SIZES, WIDTHS, UNetTests, images, make, run, stirred
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from dmoe_layer import MissingAttributesError, routing
from reference_models.models.unet import BLOCKS, TOLD, UNet
from reference_models.models.weight_files import WeightsError
from reference_models.models.weights import load_pretrained

KINDS = {**{block: {"block": block} for block in BLOCKS}, "plain": {"attribute_sizes": None}}


class TestUNet(UNetTests):
    kinds = KINDS

    @pytest.fixture(params=KINDS)
    def kind(self, request):
        return request.param


# Equal multiply-adds


def multiply_adds(model):
    """Of all that FlopCounterMode sees."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(model.eval(), images(1, (16, 16)), KNOWN[:1])
    return counter.get_total_flops() // 2


def test_blocks_have_the_mlps_multiply_adds_and_what_reading_the_attribute_takes():
    dense, values = multiply_adds(make(block="mlp")), sum(SIZES)
    further_channels = 8 * 8 * 9 * values * WIDTHS[0]
    assert multiply_adds(make(block="channels")) - dense == further_channels
    assert multiply_adds(make(block="film")) - dense == sum(2 * values * w for w in WIDTHS)
    # Its weights are put together for each sample: those of an MLP, from all values'.
    mixing = sum(values * (2 * 4 * w * w + 4 * w + w) for w in WIDTHS)
    assert multiply_adds(make(block="per_value")) - dense == mixing


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_tokens_experts_have_the_mlps_hidden_units_together(k):
    model = make(k=k, hidden=8)
    for width, stage in zip(WIDTHS, model.stages, strict=True):
        assert stage.mlp.k == k
        assert stage.mlp.k * stage.mlp.w1_EHD.shape[1] == 8 * width


# Attributes


@pytest.mark.parametrize("kind", ["channels", "film", "per_value", "moe"])
def test_what_is_not_known_is_an_error_unless_there_is_a_policy(kind):
    model, image = make(**KINDS[kind], unknown="error"), images()
    with pytest.raises(ValueError, match=r"attributes.*-1 .*unknown='error'.*unknown='average'"):
        run(model, image)
    assert run(model, image, KNOWN).isfinite().all()


@pytest.mark.parametrize("kind", ["mlp", "plain"])
def test_a_network_that_is_told_nothing_does_not_look_at_what_is_not_known(kind):
    model, image = make(**KINDS[kind], unknown="error").eval(), images()
    torch.testing.assert_close(run(model, image), run(model, image, KNOWN))


@pytest.mark.parametrize("block", [*TOLD, "moe"])
@pytest.mark.parametrize(
    ("attributes", "error", "words"),
    [
        ([[0, 0], [3, 0], [0, 0]], ValueError, "[:, 0]: got 3 (sample 1), expected -1 .. 2 "),
        ([[0, 0], [0, -2], [0, 0]], ValueError, "[:, 1]: got -2 (sample 1), expected -1 .. 1 "),
        (
            [[0], [0], [0]],
            ValueError,
            ": got shape (3, 1), which is 1 per sample, but attribute_sizes=(3, 2) needs 2 per "
            "sample. Expected the shape (3, 2).",
        ),
        (
            [[0, 0], [0, 0]],
            ValueError,
            ": got shape (2, 2) for a batch of 3 samples. Expected (3, 2), or a batch of 1 that",
        ),
        (
            [0, 0, 0],
            ValueError,
            ": got shape (3,), which is 1 per sample, but attribute_sizes=(3, 2) needs 2 per "
            "sample. Expected the shape (3, 2).",
        ),
        (
            [[0.0, 1.0]] * 3,
            TypeError,
            ": expected integers, got torch.float32 of shape (3, 2). Attributes are class indices",
        ),
    ],
)
def test_attributes_of_another_kind_are_errors(block, attributes, error, words):
    with pytest.raises(error, match="^attributes" + re.escape(words)) as caught:
        run(make(block=block), images(), torch.tensor(attributes))
    assert caught.type is error


@pytest.mark.parametrize("block", [*TOLD, "moe"])
def test_the_open_scope_is_how_a_network_is_told(block):
    model, image = stirred(make(block=block)).eval(), images()
    with pytest.raises(MissingAttributesError):
        model(image)
    with pytest.raises(MissingAttributesError), routing():
        model(image)
    everybody = run(model, image, torch.tensor([[1, 0]] * 3))
    assert torch.equal(run(model, image, torch.tensor([[1, 0]])), everybody)
    assert not torch.allclose(run(model, image, torch.tensor([[2, 1]])), everybody)


# What is not there


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"block": "moes"}, "block: got 'moes', expected one of mlp, channels"),
        ({"hidden": 0}, "hidden: got 0"),
        ({"hidden": 4, "k": 3}, "hidden: got 4, .* such that 3, the number of experts"),
        ({"k": 0}, "k: got 0"),
        ({"k": 5, "hidden": 5}, "k: got 5"),
        ({"unknown": "guess"}, "unknown: got 'guess'"),
        ({"block": "film", "unknown": "guess"}, "unknown: got 'guess'"),
        *(
            ({"block": b, "attribute_sizes": None}, f"block: got {b}, which needs attributes")
            for b in TOLD
        ),
        ({"block": "film", "attribute_sizes": ()}, "block: got film, which needs attributes"),
    ],
)
def test_options_that_are_not_there_or_do_not_divide_are_errors(wrong, words):
    with pytest.raises(ValueError, match=words):
        make(**wrong)


@pytest.mark.parametrize("widths", [(), (6, 8), (0, 4), (-4,)])
def test_widths_that_the_norms_groups_do_not_divide_are_errors(widths):
    with pytest.raises(ValueError, match=r"widths: got .*multiples of 4"):
        UNet(widths, in_channels=1, n_classes=2, attribute_sizes=SIZES)


@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 3, 8, 8), (1, 2, 10, 8), (1, 2, 8, 6)])
def test_images_of_another_kind_are_errors(shape):
    with pytest.raises(
        ValueError, match=r"image: got shape .*expected \(batch, 2, rows, columns\)"
    ):
        run(make(), torch.randn(shape), KNOWN[:1])


# Upcycling


def saved(model, path):
    save_file(model.state_dict(), path)
    return path


@pytest.mark.parametrize("options", [{}, {"k": 1}, {"unknown": "learned"}])
def test_experts_that_start_as_a_dense_network_compute_what_it_does(tmp_path, options):
    model, image = stirred(make(hidden=8, **options)).eval(), images()
    dense = make(block="mlp", hidden=8 // options.get("k", 2)).eval()
    routers = {n: v.clone() for n, v in model.state_dict().items() if ".router." in n}
    load_pretrained(model, saved(dense, tmp_path / "model.safetensors"))
    torch.testing.assert_close(run(model, image), run(dense, image), rtol=1e-4, atol=1e-5)
    assert len(routers) == 4
    assert all(torch.equal(model.state_dict()[n], value) for n, value in routers.items())


@pytest.mark.parametrize(
    ("model", "file", "words"),
    [
        ({}, {"hidden": 8}, "Its first MLP has 32 hidden units, but an expert has 8.*hidden=2"),
        ({}, {"n_classes": 2}, r"not as expected: head.weight has shape \(4, 2, 2, 2\), expected"),
        ({}, {"block": "film"}, r"left over: stages.0.film.scale_shift.weight"),
        ({}, {"block": "moe"}, "holds no MLP from which experts can start"),
        ({}, {"block": "per_value"}, "holds no MLP from which experts can start"),
        ({"block": "mlp"}, {}, "which has no experts in place of its MLPs; make the network with"),
        ({}, "nan", "NaN or infinity"),
        ({}, "cut", "damaged or is not a safetensors file"),
        ({}, "missing", "damaged or is not a safetensors file"),
    ],
)
def test_a_file_that_is_no_dense_one_of_its_sizes_leaves_the_network_as_it_was(
    tmp_path, model, file, words
):
    network, path = make(**model), tmp_path / "model.safetensors"
    before = copy.deepcopy(network.state_dict())
    dense = make(**{"block": "mlp", "hidden": 2, **(file if isinstance(file, dict) else {})})
    if file == "nan":
        dense.head.bias.data[0] = math.nan
    if file != "missing":
        saved(dense, path)
    if file == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=words) as caught:
        load_pretrained(network, path)
    assert str(path) in str(caught.value)
    assert all(torch.equal(before[n], value) for n, value in network.state_dict().items())


def test_other_files_of_weights_are_not_for_it(tmp_path):
    with pytest.raises(
        WeightsError, match=r"the network UNet can load only files that end in .safetensors"
    ):
        load_pretrained(make(), tmp_path / "ViT-B_16.npz")


# Names


def test_the_names_of_a_state_dict_stay():
    def names(model, part):
        return {n.split(part)[1] for n in model.state_dict() if n.startswith(part)}

    mlp = {"0.weight", "0.bias", "2.weight", "2.bias"}
    experts = {"w1_EHD", "w1_bias", "w2_EDH", "w2_bias", "router.w_A2ED", "router.bias"}
    assert names(make(block="mlp"), "stages.1.mlp.") == mlp
    assert names(make(), "stages.1.mlp.") == experts
    block = {f"convolutions.{n}.weight" for n in (0, 1, 3, 4)}
    block |= {"convolutions.1.bias", "convolutions.4.bias", *(f"mlp.{n}" for n in mlp)}
    assert {*make(block="film").state_dict()} == {
        *(f"stages.{n}.{name}" for n in (0, 1) for name in (*block, "film.scale_shift.weight")),
        *(f"decoder.0.{name}" for name in ("0.weight", "1.weight", "1.bias")),
        "head.weight",
        "head.bias",
    }
