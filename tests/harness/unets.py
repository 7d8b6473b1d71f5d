"""Small U-Nets in the tests: how they are made and run, what they compute, what holds of all."""

from typing import ClassVar

import naive
import pytest
import torch
import torch.nn.functional as F

from dmoe_layer import routing
from reference_models.models.unet import UNet

WIDTHS = (4, 8)
SIZES = (3, 2)
ATTRIBUTES = torch.tensor([[2, 0], [0, 1], [1, -1]])
KNOWN = torch.tensor([[2, 0], [0, 1], [1, 1]])


def make(network=UNet, **options):
    return network(
        WIDTHS,
        **{
            "in_channels": 2, "n_classes": 3, "attribute_sizes": SIZES, "unknown": "average",
            "n_experts": 4, "hidden": 4, **options,
        },
    )  # fmt: skip


def images(batch=3, size=(8, 16)):
    return torch.randn(batch, 2, *size)


def run(model, image, attributes_BA=ATTRIBUTES):
    with routing(attributes_BA):
        return model(image)


def stirred(model):
    """No two parameters alike, and all of them seen in the logits."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(0.5 * torch.randn(value.shape, generator=generator))
    return model


def members(values, unknown):
    """Which of the values of all attributes a sample belongs to, and how much."""
    found, start = [], 0
    for value, size in zip(values, SIZES, strict=True):
        if value >= 0:
            found.append((start + value, 1.0))
        elif unknown == "learned":
            found.append((start + size, 1.0))
        else:
            found += [(start + v, 1 / size) for v in range(size)]
        start += size + (unknown == "learned")
    return found


def naive_logits(model, image_BCHW, attributes_BA, kind, unknown):
    """Sample by sample and, between the convolutions, token by token."""
    state = model.state_dict()

    def convolution(name, place, x, stride=1):
        x = F.conv2d(x, state[f"{name}.{place}.weight"], None, stride, 1)
        grouped = x.reshape(4, -1)
        grouped = grouped - grouped.mean(1, keepdim=True)
        x = (grouped / (grouped.square().mean(1, keepdim=True) + 1e-5).sqrt()).reshape(x.shape)
        scale, shift = (state[f"{name}.{place + 1}.{p}"] for p in ("weight", "bias"))
        x = x * scale[:, None, None] + shift[:, None, None]
        return torch.where(x > 0, x, 0.1 * x)

    def dense(name, x):
        hidden = state[f"{name}.0.weight"] @ x + state[f"{name}.0.bias"]
        return state[f"{name}.2.weight"] @ hidden.clamp(min=0) + state[f"{name}.2.bias"]

    def experts(name, x_TD, values):
        params = {
            key.removeprefix(f"{name}."): value
            for key, value in state.items()
            if key.startswith(f"{name}.")
        }
        if kind == "shared":
            one = params.pop("router.parametrizations.w_A2ED.original")
            params["router.w_A2ED"] = one.expand(len(params["router.bias"]), -1, -1, -1)
        if kind == "sharp":
            for weight in ("w_A2ED", "bias"):
                own = params.pop(f"router.parametrizations.{weight}.original")
                params[f"router.{weight}"] = 4 * own
        sizes = None if kind in ("plain", "blind") else SIZES
        return naive.dmoe(
            x_TD[None], [values], params, sizes=sizes, unknown=unknown, k=2, activation="relu",
        )[0][0]  # fmt: skip

    def merged(name, x_TD, values):
        w1, b1, w2, b2, w_A2ED, b_A2E = (
            state[f"{name}.{p}"]
            for p in ("w1_EHD", "w1_bias", "w2_EDH", "w2_bias", "router.w_A2ED", "router.bias")
        )
        w_2ED, b_2E = naive.router_weights(w_A2ED, b_A2E, SIZES, unknown, values)
        scores = w_2ED[0] @ x_TD.mean(0) + b_2E[0]
        best = scores.topk(2).indices
        gates = scores[best].softmax(0)
        w1, b1, w2, b2 = (
            sum(gate * p[expert] for gate, expert in zip(gates, best, strict=True))
            for p in (w1, b1, w2, b2)
        )
        return torch.stack([w2 @ (w1 @ x + b1).clamp(min=0) + b2 for x in x_TD])

    def answer(stage, x_TD, values, member):
        name = f"stages.{stage}.mlp"
        if kind == "merged":
            return x_TD + merged(f"{name}.experts", x_TD, values)
        if kind in ("moe", "shared", "sharp", "plain"):
            return x_TD + experts(name, x_TD, values)
        if kind in ("modulated", "blind"):
            table = state[f"stages.{stage}.film.scale_shift.weight"]
            scale, shift = sum(share * table[:, v] for v, share in member).chunk(2)
            return x_TD + experts(name, x_TD * (1 + scale) + shift, values)
        if kind == "beside":
            always = torch.stack([dense(f"{name}.0", x) for x in x_TD])
            return x_TD + always + experts(f"{name}.1", x_TD, values)
        if kind == "after":
            x_TD = x_TD + torch.stack([dense(name, x) for x in x_TD])
            return x_TD + experts(f"stages.{stage}.after", x_TD, values)
        answers = []
        for x in x_TD:
            if kind == "film":
                table = state[f"stages.{stage}.film.scale_shift.weight"]
                scale, shift = sum(share * table[:, v] for v, share in member).chunk(2)
                answers.append(x + dense(name, x * (1 + scale) + shift))
            elif kind == "per_value":
                w1, b1, w2, b2 = (
                    sum(share * state[f"{name}.{p}"][v] for v, share in member) / len(SIZES)
                    for p in ("w1_VMD", "b1_VM", "w2_VDM", "b2_VD")
                )
                answers.append(x + w2 @ (w1 @ x + b1).clamp(min=0) + b2)
            else:
                answers.append(x + dense(name, x))
        return torch.stack(answers)

    logits = []
    for image_CHW, values in zip(image_BCHW, attributes_BA.tolist(), strict=True):
        x, maps = image_CHW[None], []
        member = members(values, unknown)
        if kind == "channels":
            n_values = sum(SIZES) + len(SIZES) * (unknown == "learned")
            planes = torch.zeros(1, n_values, *x.shape[2:], dtype=x.dtype)
            for value, share in member:
                planes[:, value] = share
            x = torch.cat([x, planes], 1)
        for stage in range(len(WIDTHS)):
            x = convolution(f"stages.{stage}.convolutions", 0, x, stride=2)
            x = convolution(f"stages.{stage}.convolutions", 3, x)
            x = answer(stage, x[0].flatten(1).T, values, member).T.reshape(x.shape)
            maps.append(x)
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = convolution("decoder.0", 0, torch.cat([x, maps[0]], 1))
        logits.append(F.conv_transpose2d(x, state["head.weight"], state["head.bias"], stride=2))
    return torch.cat(logits)


class UNetTests:
    """What must be true of every small U-Net.

    A subclass names a class of networks and kinds of it, options by name, of which its fixture
    `kind` gives each.
    """

    network = UNet
    kinds: ClassVar[dict[str, dict]]

    def make(self, kind, **options):
        return make(self.network, **self.kinds[kind], **options)

    @pytest.mark.parametrize("unknown", ["average", "learned"])
    def test_it_computes_what_a_loop_over_its_tokens_does(self, kind, unknown):
        model = stirred(self.make(kind, unknown=unknown)).double().eval()
        image = images().double()
        expected = naive_logits(model, image, ATTRIBUTES, kind, unknown)
        torch.testing.assert_close(run(model, image), expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("size", [(4, 4), (12, 8)])
    def test_logits_have_the_images_size(self, kind, size):
        assert run(self.make(kind), images(size=size)).shape == (3, 3, *size)

    @pytest.mark.parametrize("unknown", ["average", "learned"])
    def test_every_parameter_gets_a_gradient(self, kind, unknown):
        model = self.make(kind, unknown=unknown)
        told = torch.tensor([[2, 0], [0, -1], [1, 1], [-1, 0]])
        run(model, images(4), told).square().mean().backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None]
        for name, parameter in model.named_parameters():
            rows = parameter.grad.flatten(1) if "_V" in name or "_A2E" in name else parameter.grad
            seen = rows.any(1).all() if "_V" in name or "_A2E" in name else rows.any()
            assert seen, name

    def test_evaluation_repeats_itself_and_leaves_batch_mates_alone(self, kind):
        model, image = stirred(self.make(kind)).eval(), images()
        first = run(model, image)
        assert torch.equal(first, run(model, image))
        alone = [run(model, image[[i]], ATTRIBUTES[[i]]) for i in range(3)]
        torch.testing.assert_close(first, torch.cat(alone), rtol=1e-4, atol=1e-4)
        other = ATTRIBUTES.clone()
        other[1] = torch.tensor([1, 0])
        changed = (run(model, image, other) - first).flatten(1).abs().amax(1) > 1e-3
        assert changed.tolist() == [False, kind not in ("mlp", "plain"), False]

    def test_training_under_autocast_is_finite(self, kind):
        model = self.make(kind)
        with torch.autocast("cpu", torch.bfloat16):
            logits = run(model, images())
        assert logits.dtype == torch.bfloat16
        logits.float().square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())

    def test_dropout_is_the_last_thing_that_an_mlp_does(self, kind):
        """Drawn away, each MLP adds nothing, and each token is what the convolutions made."""
        model, image = stirred(self.make(kind, dropout=1.0)), images()
        maps = {}
        for n, stage in enumerate(model.stages):
            stage.convolutions.register_forward_hook(lambda *c, n=n: maps.update({n: c[-1]}))
            stage.register_forward_hook(lambda *c, n=n: maps.update({(n, "out"): c[-1]}))
        run(model, image)
        for n in range(2):
            torch.testing.assert_close(maps[n, "out"], maps[n])
