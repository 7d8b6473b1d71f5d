"""ResUNet3D computes what it says, and its experts are told the attributes and the body."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from harness.resunets3d import ATTRIBUTES, SIZE, make, run, stirred, volumes

from dmoe_layer import DMoE, MissingAttributesError, routing
from reference_models.models.resunet3d import MOE, ResUNet3D


def below(mask_BDHW, stage):
    """Whether any voxel is in the mask, of those that a voxel of the stage stands for."""
    side = 2**stage
    sides = [size // side for size in mask_BDHW.shape[1:]]
    found = torch.zeros(len(mask_BDHW), *sides, dtype=torch.bool)
    for d, h, w in itertools.product(*map(range, sides)):
        part = mask_BDHW[:, d * side :, h * side :, w * side :][:, :side, :side, :side]
        found[:, d, h, w] = part.flatten(1).any(1)
    return found


def body(batch=2, size=SIZE):
    """An odd-edged box in each sample, and some voxels alone."""
    mask_BDHW = torch.zeros(batch, *size, dtype=torch.bool)
    mask_BDHW[:, 5:23, 3:30, 9:20] = True
    mask_BDHW[:, 50, 30, 31] = True
    return mask_BDHW


def stage_outputs(model, image, mask=None):
    """What each stage's block gives, and what the stage makes of it."""
    blocks, stages = [], []
    handles = [
        module.register_forward_hook(
            lambda *call, seen=seen: seen.append(call[-1].detach().clone())
        )
        for stage in model.encoder
        for module, seen in ((stage.block, blocks), (stage, stages))
    ]
    run(model, image, mask=mask)
    for handle in handles:
        handle.remove()
    return blocks, stages


@pytest.mark.parametrize("size", [(64, 32, 32), (32, 96, 64)])
def test_logits_have_the_volumes_size(size):
    model = make(in_channels=3, n_classes=4)
    assert run(model, volumes(channels=3, size=size)).shape == (2, 4, *size)


def test_it_is_the_papers_network():
    with torch.device("meta"):
        model = ResUNet3D(n_classes=3, attribute_sizes=5)
    # What the released code's network has with three classes: 292 tensors.
    assert sum(p.numel() for p in model.parameters()) == 6_498_928
    assert [stage.block.conv1.conv.out_channels for stage in model.encoder] == [24, 24, 48, 96, 192]
    assert [stage.moe.dim for stage in model.encoder] == [24, 24, 48, 96, 192]
    assert [block.conv_block.conv1.conv.in_channels for block in model.decoder] == [
        192, 96, 48, 48,
    ]  # fmt: skip


@pytest.mark.parametrize("size", [(64, 32, 40), (64, 0, 32), (16, 64, 64), (32, 32, 32)])
def test_sides_that_the_strides_do_not_divide_or_that_leave_one_voxel_are_errors(size):
    with pytest.raises(ValueError, match=rf"image: got {' x '.join(map(str, size))} voxels.*of 32"):
        run(make(), volumes(size=size))


def test_wrong_channels_and_wrong_axes_are_errors():
    with pytest.raises(ValueError, match=r"got 2 channels, expected 1.*in_channels=2"):
        run(make(), volumes(channels=2))
    with pytest.raises(ValueError, match=r"got shape \(1, 64, 32, 32\), expected five axes"):
        run(make(), volumes()[0])


def test_masks_of_another_kind_are_errors():
    with pytest.raises(TypeError, match=r"mask: got torch.uint8, expected torch.bool"):
        run(make(), volumes(), mask=body().byte())
    for mask in (body()[:1], body()[:, None], body()[..., :16]):
        with pytest.raises(ValueError, match=r"mask: got shape .*expected \(2, 64, 32, 32\)"):
            run(make(), volumes(), mask=mask)


@pytest.mark.parametrize(
    "wrong",
    [
        {"moe": "shared"},
        {"features": 0},
        {"in_channels": 0},
        {"n_classes": 0},
        {"stages": (0, 1)},
        {"stages": (5, 6)},
        {"stages": (2, 2)},
        {"stages": ()},
    ],
)
def test_options_that_are_not_there_are_errors(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: got"):
        ResUNet3D(**{"n_classes": 2, **wrong})


@pytest.mark.parametrize("stages", [(1, 2, 3, 4, 5), (4, 2), (5,)])
def test_experts_follow_the_stages_that_were_named_and_all_their_voxels_are_tokens(stages):
    model = make(stages=stages)
    assert [n + 1 for n, stage in enumerate(model.encoder) if stage.moe] == sorted(stages)
    with routing(ATTRIBUTES) as r:
        model(volumes())
    voxels = [2 * 64 * 32 * 32 // 8**stage for stage in sorted(stages)]
    assert [len(routed.logits) for routed in r.routings] == voxels


def test_what_experts_answer_is_added_and_goes_across_and_on():
    """By hand: block plus experts, stage after stage; then up, each with its own stage's map."""
    model, image = stirred(make()).eval(), volumes()
    with routing(ATTRIBUTES):
        x, maps = image, []
        for stage in model.encoder:
            x = stage.block(x)
            assert isinstance(stage.moe, DMoE)
            alone = DMoE(x.shape[1], attribute_sizes=3, channel_dim=1).eval()
            alone.load_state_dict(stage.moe.state_dict())
            x = x + alone(x)
            maps.append(x)
        for up, skip in zip(model.decoder, maps[3::-1], strict=True):
            x = up.conv_block(torch.cat([up.transp_conv(x), skip], 1))
    expected = F.conv_transpose3d(x, model.head.weight, stride=2)
    torch.testing.assert_close(run(model, image), expected)


def test_logits_depend_on_the_samples_own_attribute():
    model, image = stirred(make()).eval(), volumes()
    told, other = run(model, image), run(model, image, torch.tensor([2, 1]))
    torch.testing.assert_close(told[0], other[0])
    assert (told[1] - other[1]).abs().max() > 1e-3
    with pytest.raises(MissingAttributesError):
        model(image)


def test_a_plain_moe_and_a_dense_network_do_not_look_at_attributes():
    for options in ({"attribute_sizes": None}, {"moe": "none"}):
        model, image = stirred(make(**options)).eval(), volumes()
        torch.testing.assert_close(run(model, image), model(image))
    assert not [m for m in model.modules() if isinstance(m, DMoE)]


def test_experts_see_the_voxels_that_stand_for_any_of_the_mask_and_leave_the_others_as_they_are():
    model, image, mask = stirred(make()).eval(), volumes(), body()
    mask[1] &= torch.rand(SIZE) > 0.9
    blocks, stages = stage_outputs(model, image, mask)
    for stage, (before, after) in enumerate(zip(blocks, stages, strict=True), start=1):
        seen_BDHW = below(mask, stage)
        assert seen_BDHW.any()
        changed_BDHW = (before != after).any(1)
        assert torch.equal(changed_BDHW, seen_BDHW)
    unmasked, _ = stage_outputs(model, image)
    torch.testing.assert_close(blocks[0], unmasked[0])


def test_a_mask_of_everything_is_no_mask_and_one_of_nothing_no_experts():
    model, image = stirred(make()).eval(), volumes()
    everything = torch.ones(2, *SIZE, dtype=torch.bool)
    torch.testing.assert_close(run(model, image, mask=everything), run(model, image))
    dense = make(moe="none").eval()
    dense.load_state_dict({n: v for n, v in model.state_dict().items() if ".moe." not in n})
    expected = dense(image)
    torch.testing.assert_close(run(model, image, mask=~everything), expected)
    torch.testing.assert_close(dense(image, everything), expected)
    one = everything.clone()
    one[0] = False
    both = run(model, image, mask=one)
    torch.testing.assert_close(both[0], expected[0])
    assert (both[1] - expected[1]).abs().max() > 1e-3


def test_training_with_samples_that_have_no_body_gives_finite_gradients():
    model, mask = make(), body()
    mask[1] = False
    for masked in (mask, mask & False):
        model.zero_grad()
        with routing(ATTRIBUTES) as r:
            logits = model(volumes(), masked)
        (logits.square().mean() + r.load_balancing_loss() + r.router_z_loss()).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("moe", MOE)
def test_every_parameter_gets_a_gradient(moe):
    model = make(moe=moe)
    run(model, volumes()).square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("moe", MOE)
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_checkpointing_changes_nothing_with_noise_and_dropout_on(moe, masked):
    image, mask, results = volumes(), body() if masked else None, []
    for gradient_checkpointing in (False, True):
        torch.manual_seed(0)
        model = make(moe=moe, gradient_checkpointing=gradient_checkpointing)
        torch.manual_seed(1)
        with routing(ATTRIBUTES) as r:
            logits = model(image, mask)
        loss = logits.square().mean() + 0.1 * r.load_balancing_loss()
        with routing(torch.tensor([1, 1])):  # the recompute must not ask this scope
            loss.backward()
        results.append((loss, len(r.routings), {n: p.grad for n, p in model.named_parameters()}))
    (loss, calls, gradients), (loss_again, calls_again, gradients_again) = results
    assert torch.equal(loss, loss_again)
    assert calls == calls_again == (5 if moe == "per_block" else 0)
    torch.testing.assert_close(gradients_again, gradients)


def test_checkpointing_recomputes_every_block_and_holds_less():
    held = {}
    for gradient_checkpointing in (False, True):
        model, runs, sizes = make(gradient_checkpointing=gradient_checkpointing), [], {}
        for module in (model.encoder[0].block, model.encoder[0].moe, model.decoder[3]):
            module.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = run(model, volumes())
        held[gradient_checkpointing] = sum(sizes.values())
        assert len(runs) == 3
        logits.sum().backward()
        assert len(runs) == (6 if gradient_checkpointing else 3)
        with torch.no_grad():
            run(model, volumes())
        assert len(runs) == (9 if gradient_checkpointing else 6)
    assert held[True] < 0.5 * held[False]


@pytest.mark.parametrize("size", [(32, 64, 32), (64, 32, 32), (128, 32, 32)])
def test_every_convolutions_gradient_is_right_under_autocast(size):
    model, inputs, gradients = make(4), {}, {}
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv3d)]
    for convolution in convolutions:
        convolution.register_forward_hook(lambda m, x, _: inputs.update({m: x[0].detach()}))
        convolution.register_full_backward_hook(lambda m, _, dy: gradients.update({m: dy[0]}))
    with torch.autocast("cpu", torch.bfloat16):
        logits = run(model, volumes(size=size).requires_grad_())
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    for convolution in convolutions:
        weight = convolution.weight
        x, dy = (seen[convolution].bfloat16().double() for seen in (inputs, gradients))
        expected = torch.nn.grad.conv3d_weight(
            x, weight.shape, dy, convolution.stride, convolution.padding
        )
        assert (weight.grad - expected).norm() < 0.02 * expected.norm()


def test_experts_work_under_autocast():
    model, image = make(4).eval(), volumes()
    with torch.autocast("cpu", torch.bfloat16):
        low = run(model, image, mask=body())
    expected = run(model, image, mask=body())
    assert low.dtype == torch.bfloat16
    assert (low.float() - expected).norm() / expected.norm() < 0.1
    low.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_volume_in_channels_last_computes_the_same_and_trains():
    model, image = make(), volumes()
    expected = run(model.eval(), image)
    for convolution in model.modules():
        if isinstance(convolution, (torch.nn.Conv3d, torch.nn.ConvTranspose3d)):
            convolution.to(memory_format=torch.channels_last_3d)
    image = image.to(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(run(model, image), expected, rtol=1e-4, atol=1e-5)
    run(model.train(), image).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_evaluation_repeats_itself_and_leaves_batch_mates_alone():
    model, image, mask = stirred(make()).eval(), volumes(), body()
    mask[1, :20] = False
    first = run(model, image, mask=mask)
    assert torch.equal(first, run(model, image, mask=mask))
    alone = [run(model, image[[i]], ATTRIBUTES[[i]], mask[[i]]) for i in range(2)]
    torch.testing.assert_close(first, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_the_names_of_a_state_dict_stay_and_make_the_network_again():
    model = stirred(make(stages=(2, 3))).eval()
    state = model.state_dict()
    convolutions = [f"conv{n}.conv.weight" for n in (1, 2, 3)]
    experts = ["w1_EHD", "w1_bias", "w2_EDH", "w2_bias", "router.w_A2ED", "router.bias"]
    assert {*state} == {
        *(f"encoder.{n}.block.{c}" for n in range(5) for c in convolutions),
        *(f"encoder.{n}.moe.{e}" for n in (1, 2) for e in experts),
        *(f"decoder.{n}.conv_block.{c}" for n in range(4) for c in convolutions),
        *(f"decoder.{n}.transp_conv.conv.weight" for n in range(4)),
        "head.weight",
    }
    again = make(stages=(3, 2)).eval()
    again.load_state_dict(state)
    image = volumes()
    assert torch.equal(run(model, image), run(again, image))


def test_all_but_the_head_stands_in_lists_of_blocks_for_fsdp_to_shard_one_by_one():
    model = make()
    listed = {
        parameter
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList)
        for parameter in module.parameters()
    }
    assert {*model.parameters()} - listed == {model.head.weight}


def test_it_trains_from_scratch():
    torch.manual_seed(0)
    model, image = make(4), volumes()
    label = (F.avg_pool3d(image, 5, 1, 2)[:, 0] > 0).long()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(run(model, image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
