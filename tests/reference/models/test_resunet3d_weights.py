"""A ResUNet3D takes the paper's released 3D weights whole, or says what does not fit.

Files are made with the entries that those are known to have, spelled out one by one and not by the
loader's tables; what a network computes from them is said once more in plain functions.
"""

import numpy as np
import pytest
import torch
from harness.resunets3d import SIZE, make, released_entries, released_logits, run, stirred, volumes
from harness.transunets import make as make_2d

from reference_models.models.weight_files import WeightsError
from reference_models.models.weights import load_pretrained
from reference_models.models.weights2d import load_released_2d
from reference_models.models.weights3d import load_released_3d

ATTRIBUTES = torch.tensor([4, 0, 2])


def make_released(features=2, **options):
    return stirred(make(features, **{"attribute_sizes": 5, **options}))


def save(path, state):
    torch.save(state, path)
    return path


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("size", [SIZE, (32, 32, 96)])
def test_a_released_checkpoint_gives_the_released_networks_logits(size, tmp_path):
    state = {n: v.double() for n, v in released_entries(3, channels=2, classes=3).items()}
    prefixed = {f"module.{name}": value for name, value in state.items()}  # by DataParallel
    model = make_released(3, in_channels=2, n_classes=3).double().eval()
    load_pretrained(model, save(tmp_path / "best.pth", prefixed))
    image = volumes(batch=3, channels=2, size=size).double()
    expected = released_logits(state, image, ATTRIBUTES)
    torch.testing.assert_close(run(model, image, ATTRIBUTES), expected, rtol=1e-9, atol=1e-9)
    other = released_logits(state, image, torch.tensor([4, 1, 2]))
    # The experts are seen in the logits, and only in those of the sample with another value.
    assert [(o - e).abs().max() > 1e-2 for o, e in zip(other, expected, strict=True)] == [
        False, True, False,
    ]  # fmt: skip


def test_every_number_of_a_released_checkpoint_is_in_the_network(tmp_path):
    state = released_entries()
    assert len(state) == 292
    model = make_released()
    load_released_3d(model, save(tmp_path / "best.pth", state))
    theirs, ours = (
        torch.cat([v.flatten() for v in s.values()]).sort().values
        for s in (state, model.state_dict())
    )
    assert torch.equal(theirs, ours)


def test_noise_weights_are_the_files_too(tmp_path):
    state = released_entries()
    model = make_released()
    load_released_3d(model, save(tmp_path / "best.pth", state))
    router = model.encoder[3].moe.router
    for a in range(5):
        for i, part in enumerate(("topkroute_linear", "noise_linear")):
            name = f"sparseMoE.3.router.{a}.{part}"
            assert torch.equal(router.w_A2ED[a, i], state[f"{name}.weight"])
            assert torch.equal(router.bias[a, i], state[f"{name}.bias"])


def test_a_file_without_experts_loads_into_a_dense_network(tmp_path):
    state = released_entries(stages=())
    model = make_released(moe="none")
    load_released_3d(model, save(tmp_path / "best.pth", state))
    assert torch.equal(model.head.weight, state["out.transp_conv.conv.weight"])


@pytest.mark.parametrize(
    ("made", "file", "said"),
    [
        ({"attribute_sizes": 4}, {}, "5 routers.*attribute_sizes=5 and unknown='error'"),
        ({"attribute_sizes": None}, {}, "5 routers.*attribute_sizes=5"),
        ({"attribute_sizes": 4, "unknown": "learned"}, {}, "5 routers.*unknown='error'"),
        ({"attribute_sizes": (3, 2)}, {}, "5 routers.*attribute_sizes=5"),
        ({"unknown": "learned"}, {}, "5 routers.*unknown='error' or 'average'"),
        ({"n_classes": 3}, {}, "2 classes: make the network with n_classes=2"),
        ({"features": 4}, {}, "2 channels in its first stage: make the network with features=2"),
        ({"in_channels": 2}, {}, "1 channels in its images.*in_channels=1"),
        ({"n_experts": 4}, {}, "8 experts: make the network with n_experts=8"),
        ({"moe": "none"}, {}, r"after its stages 1, 2, 3, 4, 5.*stages=\(1, 2, 3, 4, 5\)"),
        ({"stages": (1, 2)}, {"stages": (1, 4)}, r"after its stages 2, 5.*stages=\(2, 5\)"),
        ({}, {"stages": ()}, "no experts: make the network with moe='none'"),
    ],
)
def test_another_network_than_the_released_one_is_told_what_differs(made, file, said, tmp_path):
    path = save(tmp_path / "best.pth", released_entries(**file))
    model = make_released(**made)
    before = snapshot(model)
    with pytest.raises(WeightsError, match=said) as caught:
        load_released_3d(model, path)
    assert str(path) in str(caught.value)
    assert str(caught.value).count("make the network with") == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_entries_that_are_missing_left_over_or_wrong_are_listed_and_nothing_is_loaded(tmp_path):
    state = released_entries()
    del state["encoder10.layer.conv3.conv.weight"], state["sparseMoE.4.experts.7.net.2.bias"]
    state["encoder1.layer.norm1.weight"] = torch.zeros(2)
    state["decoder1.conv_block.conv2.conv.weight"] = torch.zeros(2, 2, 1, 1, 1)
    state["sparseMoE.0.router.3.noise_linear.bias"][2] = torch.nan
    model = make_released()
    before = snapshot(model)
    with pytest.raises(WeightsError) as caught:
        load_released_3d(model, save(tmp_path / "best.pth", state))
    assert str(caught.value).splitlines()[1:] == [
        "  missing: encoder10.layer.conv3.conv.weight, sparseMoE.4.experts.7.net.2.bias.",
        "  left over: encoder1.layer.norm1.weight.",
        "  not as expected: sparseMoE.0.router.3.noise_linear.bias holds NaN or infinity, "
        "decoder1.conv_block.conv2.conv.weight has shape (2, 2, 1, 1, 1), expected "
        "(2, 2, 3, 3, 3).",
    ]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_file_of_another_kind_of_network_is_said_to_be_that(tmp_path):
    np.savez(tmp_path / "ViT-B_16.npz", cls=np.zeros(3))
    with pytest.raises(
        WeightsError, match=r"the network ResUNet3D can load only files that end in \.pth"
    ):
        load_pretrained(make(), tmp_path / "ViT-B_16.npz")
    with pytest.raises(WeightsError, match="the network Linear can load no files of weights"):
        load_pretrained(torch.nn.Linear(1, 1), tmp_path / "best.pth")
    flat = save(tmp_path / "2d.pth", {"transformer.embeddings.position_embeddings": torch.ones(1)})
    with pytest.raises(WeightsError, match="is not of the paper's released 3D network"):
        load_pretrained(make(), flat)
    solid = save(tmp_path / "3d.pth", released_entries())
    with pytest.raises(WeightsError, match="is not of the paper's released 2D network"):
        load_released_2d(make_2d(), solid)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda t: t.int(), r"encoder1.layer.conv1.conv.weight holds torch.int32"),
        (lambda t: t + 1j, "holds torch.complex64, expected floating-point numbers"),
        (lambda t: t.to_sparse(), "encoder1.layer.conv1.conv.weight is sparse"),
        (lambda t: t.to("meta"), "has no numbers"),
    ],
)
def test_entries_that_are_no_plain_numbers_are_an_error(spoil, said, tmp_path):
    state = released_entries()
    state["encoder1.layer.conv1.conv.weight"] = spoil(state["encoder1.layer.conv1.conv.weight"])
    with pytest.raises(WeightsError, match=said):
        load_released_3d(make_released(), save(tmp_path / "best.pth", state))


def test_a_file_with_numbers_for_names_or_cut_short_is_said_to_be_that(tmp_path):
    with pytest.raises(WeightsError, match="expected a state_dict of tensors, got a dict of 1"):
        load_released_3d(make_released(), save(tmp_path / "best.pth", {1: torch.ones(2)}))
    whole = save(tmp_path / "best.pth", released_entries()).read_bytes()
    # Of some lengths PyTorch's reader says no more than "Invalid argument".
    (tmp_path / "best.pth").write_bytes(whole[:50_000])
    with pytest.raises(WeightsError, match="is damaged"):
        load_released_3d(make_released(), tmp_path / "best.pth")
