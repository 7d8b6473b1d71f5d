"""TransUNet computes what it says, and its experts are told the attributes."""

import pytest
import torch
import torch.nn.functional as F
from harness.transunets import ATTRIBUTES, TINIES, TINY_HYBRID, TINY_VIT, images, make, run, stirred

from dmoe_layer import DMoE, MissingAttributesError, routing
from reference_models.models.transunet import MOE, TransUNet


@pytest.mark.parametrize("variant", ["small", TINY_VIT, TINY_HYBRID])
@pytest.mark.parametrize("size", [32, (32, 80)])
def test_logits_have_the_images_size_square_or_not(variant, size):
    model = make(variant, n_classes=4, image_size=size)
    size = (size, size) if isinstance(size, int) else size
    assert run(model, images(size=size)).shape == (3, 4, *size)


def test_the_variants_are_the_papers_networks():
    def parameters(module):
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        pure = TransUNet("vit_b16", n_classes=3, attribute_sizes=3)
        hybrid = TransUNet("r50_vit_b16", n_classes=3, moe="none")
    # ViT-B/16 has 86,567,656 parameters with its class token and a head of 1000 classes.
    classifier = 768 + 768 + 1000 * 769  # class token, its position, head
    assert parameters(pure.vit) - parameters(pure.vit.moe) == 86_567_656 - classifier
    assert 37.7e6 < parameters(pure.vit.moe) < 37.9e6
    assert [len(stage) for stage in hybrid.stem.stages] == [3, 4, 9]
    assert [block[0][0].in_channels for block in hybrid.decoder.blocks] == [
        512 + 512, 256 + 256, 128 + 64, 64,
    ]  # fmt: skip
    assert [block[0][0].in_channels for block in pure.decoder.blocks] == [512, 256, 128, 64]


@pytest.mark.parametrize("size", [90, (32, 40), (16, 0)])
def test_a_size_that_the_patches_do_not_divide_is_an_error(size):
    with pytest.raises(ValueError, match=r"image_size: got .* multiples of 16"):
        make(image_size=size)
    model = make()
    with pytest.raises(ValueError, match="image: got 32 x 40 pixels, expected two multiples of 16"):
        run(model, images(size=(32, 40)))


def test_wrong_channels_and_wrong_axes_are_errors():
    with pytest.raises(ValueError, match=r"got 2 channels, expected 3.*in_channels=2"):
        run(make(), images(channels=2))
    with pytest.raises(ValueError, match="got 3 channels, expected 1"):
        run(make("small", in_channels=1), images())
    with pytest.raises(ValueError, match=r"got shape \(3, 32, 32\), expected \(batch"):
        run(make(), images()[0])


@pytest.mark.parametrize("wrong", [{"variant": "vit_b32"}, {"moe": "all"}, {"n_classes": 0}])
def test_options_that_are_not_there_are_errors(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: got"):
        TransUNet(**{"n_classes": 2, **wrong})


def test_gray_images_are_taken_as_three_equal_channels():
    image = images(channels=1)
    for model in (make(in_channels=1).eval(), make(in_channels=3).eval()):
        assert model.in_channels == 3
        torch.testing.assert_close(run(model, image), run(model, image.repeat(1, 3, 1, 1)))


def test_an_image_of_another_size_gets_its_own_positions():
    model, larger = make().eval(), make(image_size=(48, 64)).eval()
    state = model.state_dict()
    state["vit.positions_1DHW"] = F.interpolate(
        state["vit.positions_1DHW"], (3, 4), mode="bilinear", align_corners=True
    )
    larger.load_state_dict(state)
    image = images(size=(48, 64))
    torch.testing.assert_close(run(model, image), run(larger, image))


@pytest.mark.parametrize("variant", ["small", TINY_VIT, TINY_HYBRID])
def test_channels_last_computes_the_same_and_trains(variant):
    model, image = make(variant, in_channels=1, moe="none"), images(channels=1)
    expected = model.eval()(image)
    model = model.to(memory_format=torch.channels_last)
    image = image.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-5)
    model.train()(image).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_autocast_gives_nearly_the_same():
    for config in TINIES.values():
        model, image = make(config).eval(), images()
        with torch.autocast("cpu", torch.bfloat16):
            low = run(model, image)
        expected = run(model, image)
        assert low.dtype == torch.bfloat16
        error = (low.float() - expected).norm() / expected.norm()
        assert error < 0.1


@pytest.mark.parametrize("moe", MOE)
@pytest.mark.parametrize("variant", ["small", TINY_VIT, TINY_HYBRID])
def test_every_parameter_gets_a_gradient(variant, moe):
    model = make(variant, moe=moe)
    run(model, images()).square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize(
    ("moe", "layers", "calls"),
    [("shared", 1, 3), ("per_block", 3, 3), ("mlp", 3, 3), ("none", 0, 0)],
)
def test_each_moe_has_its_layers_and_calls(moe, layers, calls):
    model = make(moe=moe)
    found = {m for m in model.modules() if isinstance(m, DMoE)}
    assert len(found) == layers
    assert {m.residual for m in found} <= {moe != "mlp"}
    with routing(ATTRIBUTES) as r:
        model(images())
    assert len(r.routings) == calls


@pytest.mark.parametrize("moe", ["shared", "per_block", "mlp"])
def test_logits_depend_on_the_samples_own_attribute(moe):
    # Upcycled experts are alike at first, so that it does not matter which are chosen.
    model, image = stirred(make(moe=moe)).eval(), images()
    told, other = run(model, image), run(model, image, torch.tensor([2, 1, 1]))
    torch.testing.assert_close(told[[0, 2]], other[[0, 2]])
    assert (told[1] - other[1]).abs().max() > 1e-3
    with pytest.raises(MissingAttributesError):
        model(image)


def test_a_plain_moe_and_a_dense_network_do_not_look_at_attributes():
    for options in ({"attribute_sizes": None}, {"moe": "none"}):
        model, image = stirred(make(**options)).eval(), images()
        torch.testing.assert_close(run(model, image), model(image))
    assert not [m for m in model.modules() if isinstance(m, DMoE)]


def test_a_shared_layer_stands_after_every_block():
    """By hand: block, experts, block, experts, ..., norm."""
    model, image = stirred(make()).eval(), images()
    vit = model.vit
    with routing(ATTRIBUTES):
        x = vit.patch_embedding(image) + vit.positions_1DHW
        x = x.flatten(2).mT
        for block in vit.blocks:
            x = vit.moe[0](block(x))
        x = vit.norm(x).mT.unflatten(2, (2, 2))
        torch.testing.assert_close(vit(image), x)


def test_upcycled_experts_start_as_the_networks_own_mlps():
    torch.manual_seed(3)
    dense = make(moe="none").eval()
    torch.manual_seed(3)
    upcycled = make(moe="mlp").eval()
    state = dense.state_dict()
    same = {n: v for n, v in upcycled.state_dict().items() if ".mlp." not in n}
    upcycled.load_state_dict({n: state[n] for n in same}, strict=False)
    image = images()
    torch.testing.assert_close(run(upcycled, image), dense(image))
    assert {m.dropout.p for m in upcycled.modules() if isinstance(m, DMoE)} == {0.1}


@pytest.mark.parametrize("moe", MOE)
def test_gradient_checkpointing_changes_nothing_with_noise_and_dropout_on(moe):
    image, results = images(), []
    for gradient_checkpointing in (False, True):
        torch.manual_seed(0)
        model = make(TINY_HYBRID, moe=moe, gradient_checkpointing=gradient_checkpointing)
        torch.manual_seed(1)
        with routing(ATTRIBUTES) as r:
            logits = model(image)
        loss = logits.square().mean() + 0.1 * r.load_balancing_loss()
        with routing(torch.tensor([1, 1, 0])):  # the recompute must not ask this scope
            loss.backward()
        results.append((loss, len(r.routings), {n: p.grad for n, p in model.named_parameters()}))
    (loss, calls, gradients), (loss_again, calls_again, gradients_again) = results
    assert torch.equal(loss, loss_again)
    assert calls == calls_again
    torch.testing.assert_close(gradients_again, gradients)


def test_checkpointing_recomputes_each_block():
    model = make(gradient_checkpointing=True)
    runs = []
    model.vit.blocks[1].mlp.register_forward_hook(lambda *_: runs.append(1))
    logits = run(model, images())
    assert len(runs) == 1
    logits.sum().backward()
    assert len(runs) == 2
    with torch.no_grad():
        run(model, images())
    assert len(runs) == 3


@pytest.mark.parametrize("moe", MOE)
def test_evaluation_repeats_itself_and_leaves_batch_mates_alone(moe):
    model, image = make(TINY_HYBRID, moe=moe).eval(), images()
    first = run(model, image)
    assert torch.equal(first, run(model, image))
    alone = torch.cat([run(model, image[i : i + 1], ATTRIBUTES[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("moe", MOE)
def test_a_state_dict_makes_the_network_again(moe):
    model = stirred(make(TINY_HYBRID, moe=moe)).eval()
    again = make(TINY_HYBRID, moe=moe).eval()
    again.load_state_dict(model.state_dict())
    image = images()
    assert torch.equal(run(model, image), run(again, image))


@pytest.mark.parametrize("variant", ["small", TINY_VIT, TINY_HYBRID])
def test_it_trains_from_scratch(variant):
    model = make(variant, in_channels=1)
    image = images(channels=1)
    label = (F.avg_pool2d(image, 5, 1, 2)[:, 0] > 0).long()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):  # after 30 the dropout that was drawn decides
        loss = F.cross_entropy(run(model, image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_the_skips_have_the_decoders_sizes_and_zeros_where_the_pooling_leaves_none():
    stem = stirred(make(TINY_HYBRID)).stem
    _, (eighth, quarter, half) = stem(images(size=(32, 48)))
    assert [tuple(s.shape[1:]) for s in (eighth, quarter, half)] == [
        (32, 4, 6), (16, 8, 12), (4, 16, 24),
    ]  # fmt: skip
    assert not quarter[:, :, -1].any()
    assert not quarter[..., -1].any()
    assert quarter[:, :, 0].any()
    assert quarter[..., 0].any()
