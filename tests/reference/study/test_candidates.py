"""The study's candidates compute what they say, and their recipes are read as they were written."""

import copy
import json

import pytest
import torch
from harness.unets import KNOWN, SIZES, WIDTHS, UNetTests, images, make, run, stirred
from safetensors.torch import save_file

from dmoe_layer import DMoE, MissingAttributesError
from reference_models.data import DataSettings
from reference_models.models.unet import UNet
from reference_models.models.weight_files import WeightsError
from reference_models.models.weights import load_pretrained
from reference_models.recipes.recipe import Recipe
from reference_models.recipes.serial import from_json, to_json
from reference_models.study.candidates import CandidateSettings, CandidateUNet

KINDS = {
    "after": {"placement": "after"},
    "beside": {"placement": "beside"},
    "modulated": {"modulate": True},
    "merged": {"merge": True},
    "shared": {"router": "shared"},
    "sharp": {"router": "sharp"},
    "blind": {"router": "blind", "modulate": True},
}


def candidate(**options):
    return make(CandidateUNet, **options)


class TestCandidates(UNetTests):
    network = CandidateUNet
    kinds = KINDS

    @pytest.fixture(params=KINDS)
    def kind(self, request):
        return request.param


def test_a_candidate_without_a_change_is_the_u_net():
    networks = []
    for network in (UNet, CandidateUNet):
        torch.manual_seed(0)
        networks.append(make(network).eval())
    own, other = (network.state_dict() for network in networks)
    assert [*own] == [*other]
    assert all(torch.equal(own[name], other[name]) for name in own)


@pytest.mark.parametrize("options", [{"block": "film"}, {"modulate": True}])
def test_scales_and_shifts_start_as_1_and_0_where_asked_for(options):
    for width, stage in zip(WIDTHS, candidate(**options, film_identity=True).stages, strict=True):
        x_BHWD = torch.randn(3, 2, 2, width)
        assert torch.equal(run(stage.film, x_BHWD), x_BHWD)
    assert all(stage.film.scale_shift.weight.all() for stage in candidate(**options).stages)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_an_mlp_and_experts_after_it_share_the_hidden_units(k):
    model = candidate(k=k, placement="after", hidden=8)
    for width, stage in zip(WIDTHS, model.stages, strict=True):
        assert stage.after.k == k
        assert stage.after.k * stage.after.w1_EHD.shape[1] == 4 * width
        assert stage.mlp[0].out_features == 4 * width


@pytest.mark.parametrize("kind", ["after", "shared", "merged", "modulated", "blind"])
def test_what_is_not_known_is_an_error_unless_there_is_a_policy(kind):
    model, image = candidate(**KINDS[kind], unknown="error"), images()
    with pytest.raises(ValueError, match=r"attributes.*-1 .*unknown='error'.*unknown='average'"):
        run(model, image)
    assert run(model, image, KNOWN).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_open_scope_is_how_a_candidate_is_told(kind):
    with pytest.raises(MissingAttributesError):
        candidate(**KINDS[kind])(images())


def test_a_shared_router_has_one_set_of_weights_and_biases_of_each_value():
    model, own = candidate(router="shared"), make()
    for width, stage, other in zip(WIDTHS, model.stages, own.stages, strict=True):
        routers = stage.mlp.router
        w_A2ED = routers.w_A2ED
        assert w_A2ED.shape == other.mlp.router.w_A2ED.shape == (5, 2, 4, width)
        assert all(torch.equal(w_A2ED[0], w) for w in w_A2ED)
        assert not any(torch.equal(routers.bias[0], b) for b in routers.bias[1:])
        counts = [sum(p.numel() for p in r.parameters()) for r in (other.mlp.router, routers)]
        assert counts[0] - counts[1] == 4 * 2 * 4 * width
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    before = copy.deepcopy(model.state_dict())
    run(model, images(), KNOWN).square().mean().backward()
    optimizer.step()
    routers = model.stages[1].mlp.router
    assert all(torch.equal(routers.w_A2ED[0], w) for w in routers.w_A2ED)
    names = [n for n in before if ".router." in n]
    assert len(names) == 4
    assert not any(torch.equal(before[n], model.state_dict()[n]) for n in names)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"placement": "before"}, "placement: got 'before', expected one of mlp, after, beside"),
        ({"router": "none"}, "router: got 'none'"),
        ({"placement": "after", "merge": True}, "placement: got 'after', expected mlp with merge"),
        (
            {"hidden": 1, "k": 4, "placement": "after"},
            "hidden: got 1, .* that 8, the number of experts of a token, divides",
        ),
        (
            {"modulate": True, "attribute_sizes": None},
            "modulate: the network needs attribute_sizes",
        ),
    ],
)
def test_options_that_are_not_there_or_do_not_divide_are_errors(wrong, words):
    with pytest.raises(ValueError, match=words):
        candidate(**wrong)


def test_experts_with_a_shared_router_start_as_a_dense_network(tmp_path):
    model, image = stirred(candidate(hidden=8, router="shared")).eval(), images()
    dense = make(block="mlp", hidden=4).eval()
    routers = {n: v.clone() for n, v in model.state_dict().items() if ".router." in n}
    save_file(dense.state_dict(), tmp_path / "model.safetensors")
    load_pretrained(model, tmp_path / "model.safetensors")
    torch.testing.assert_close(run(model, image), run(dense, image), rtol=1e-4, atol=1e-5)
    assert len(routers) == 4
    assert all(torch.equal(model.state_dict()[n], value) for n, value in routers.items())


def test_a_network_with_an_mlp_before_its_experts_starts_as_no_dense_one(tmp_path):
    save_file(make(block="mlp", hidden=2).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="no experts in place of its MLPs"):
        load_pretrained(candidate(placement="after"), tmp_path / "model.safetensors")


def test_the_names_of_a_state_dict_stay():
    def names(model, part):
        return {n.split(part)[1] for n in model.state_dict() if n.startswith(part)}

    mlp = {"0.weight", "0.bias", "2.weight", "2.bias"}
    experts = {"w1_EHD", "w1_bias", "w2_EDH", "w2_bias", "router.w_A2ED", "router.bias"}
    after = candidate(placement="after")
    assert names(after, "stages.0.mlp.") == mlp
    assert names(after, "stages.0.after.") == experts
    assert isinstance(after.stages[0].after, DMoE)
    beside = candidate(placement="beside")
    assert names(beside, "stages.0.mlp.0.") == mlp
    assert names(beside, "stages.0.mlp.1.") == experts
    assert names(candidate(merge=True), "stages.0.mlp.experts.") == experts
    assert names(candidate(modulate=True), "stages.0.film.") == {"scale_shift.weight"}


def test_a_recipe_of_a_candidate_is_read_as_it_was_written_and_builds_the_candidate():
    settings = CandidateSettings(widths=(4,), hidden=2, placement="after", film_identity=True)
    recipe = Recipe(DataSettings("phantom"), model=settings)
    found = from_json(Recipe, json.loads(json.dumps(to_json(recipe))))
    assert found == recipe
    assert type(found.model) is CandidateSettings
    sizes = {"in_channels": 1, "n_classes": 2, "attribute_sizes": SIZES, "shape": (8, 8)}
    built = found.model.build(**sizes)
    assert isinstance(built, CandidateUNet)
    assert (built.placement, built.film_identity, built.merge) == ("after", True, False)
