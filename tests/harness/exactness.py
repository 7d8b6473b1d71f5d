"""Holds a layer against the naive loop: random configurations, outputs and every gradient."""

from contextlib import contextmanager

import naive
import torch
from hypothesis import strategies as st

from dmoe_layer import DMoE, Routing
from dmoe_layer.dropout import Dropout
from dmoe_layer.eager import experts, router
from dmoe_layer.operators import draw_seed

# Largest difference over the largest true value.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def assert_close(found, true, dtype, what):
    true = true.to(torch.float64)
    assert found.shape == true.shape, what
    assert torch.isfinite(found).all(), what
    scale = true.abs().max().item() if true.numel() else 0.0
    error = (found.double() - true).abs().max().item() if true.numel() else 0.0
    assert error <= TOLERANCE[dtype] * max(scale, 1e-3), f"{what}: {error} of {scale}"


@st.composite
def configurations(draw):
    n_experts = draw(st.integers(1, 6))
    sizes = draw(st.sampled_from([None, 3, (3,), (2, 3), (1, 2, 2)]))
    columns = () if sizes is None else (sizes,) if isinstance(sizes, int) else sizes
    unknown = draw(st.sampled_from(["error", "average", "learned"]))
    batch = draw(st.integers(0, 4))
    lowest = 0 if unknown == "error" else -1
    values = [[draw(st.integers(lowest, size - 1)) for size in columns] for _ in range(batch)]
    return {
        "dim": draw(st.integers(1, 9)),
        "hidden_dim": draw(st.sampled_from([None, 1, 5, 16])),
        "n_experts": n_experts,
        "k": draw(st.integers(1, n_experts)),
        "attribute_sizes": sizes,
        "unknown": unknown,
        "activation": draw(st.sampled_from(sorted(naive.ACTIVATIONS))),
        "bias": draw(st.booleans()),
        "noise": draw(st.sampled_from(["train", "always", "never"])),
        "dropout": draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        "residual": draw(st.booleans()),
    }, {
        "batch": batch,
        "tokens": draw(st.integers(0, 7)),
        "values": values,
        "training": draw(st.booleans()),
        "masked": draw(st.booleans()),
        "block_rows": draw(st.sampled_from([3, 1024])),
        "seed": draw(st.integers(0, 2**31)),
    }


def true_noise(noisy, tokens, n_experts, dtype):
    """The draws of the call that follows, (T, E), as the router will make them."""
    if not noisy:
        return None
    return router._noise(torch.empty(tokens, n_experts, dtype=dtype), draw_seed())


def true_dropout(p, indices_TK, n_experts, dim, dtype):
    """The factors of the call that follows, (T, k, D): drawn row by row in sorted order."""
    (tokens, k), factors = indices_TK.shape, []
    drop = Dropout(p, draw_seed(), indices_TK.device)
    for chunk_CK in indices_TK.split(max(experts.LEAST_BLOCK_ROWS * n_experts // k, 1)):
        rows_RD = drop(torch.ones(chunk_CK.numel(), dim, dtype=dtype)) * drop.scale
        order = chunk_CK.flatten().sort(stable=True).indices
        factors.append(torch.empty_like(rows_RD).index_copy(0, order, rows_RD))
    return torch.cat(factors).view(tokens, k, dim)


@contextmanager
def blocks_of(rows):
    """At most so many rows in a block of the eager backend, whatever the width."""
    original = experts.BLOCK_ENTRIES, experts.LEAST_BLOCK_ROWS
    experts.BLOCK_ENTRIES, experts.LEAST_BLOCK_ROWS = 0, rows
    try:
        yield
    finally:
        experts.BLOCK_ENTRIES, experts.LEAST_BLOCK_ROWS = original


def zero_if_none(tensor):
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def run_both(options, call, dtype, device="cpu", noise=true_noise, dropout=true_dropout):
    """(found, true) pairs of y, the routing, and every gradient of a loss on all of them.

    ``noise`` and ``dropout`` know what the backend draws from the same seeds.
    """
    generator = torch.Generator().manual_seed(call["seed"])
    layer = DMoE(**options, dtype=dtype).train(call["training"]).to(device)
    dim, n_experts, k = layer.dim, layer.n_experts, layer.k
    batch, tokens = call["batch"], call["tokens"]
    shape = (batch, tokens, dim)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    mask = torch.rand(batch, tokens, generator=generator) < 0.6 if call["masked"] else None
    kept = torch.ones(batch, tokens, dtype=torch.bool) if mask is None else mask
    sizes = layer.router.sizes
    values = None
    if sizes is not None:
        values = torch.tensor(call["values"], dtype=torch.int64).reshape(batch, len(sizes))

    torch.manual_seed(call["seed"])
    y, routing = layer(
        x.to(device),
        None if values is None else values.to(device),
        mask=None if mask is None else mask.to(device),
        return_routing=True,
    )
    y, routing = y.cpu(), Routing(*(None if t is None else t.cpu() for t in routing))

    torch.manual_seed(call["seed"])
    score_dtype = torch.promote_types(dtype, torch.float32)
    noisy = options["noise"] == "always" or (options["noise"] == "train" and call["training"])
    noise_TE = noise(noisy, int(kept.sum()), n_experts, score_dtype)
    noise_BTE = None
    if noise_TE is not None:
        noise_BTE = torch.zeros(batch, tokens, n_experts, dtype=torch.float64)
        noise_BTE[kept] = noise_TE.double()
    drop_BTKD = None
    if call["training"] and options["dropout"]:
        factors = dropout(options["dropout"], routing.expert_indices, n_experts, dim, torch.float64)
        drop_BTKD = torch.zeros(batch, tokens, k, dim, dtype=torch.float64)
        drop_BTKD[kept] = factors
    chosen_BTK = torch.zeros(batch, tokens, k, dtype=torch.int64)
    chosen_BTK[kept] = routing.expert_indices
    true_x = x.detach().double().requires_grad_()
    true_params = {
        n: p.detach().cpu().double().requires_grad_() for n, p in layer.named_parameters()
    }
    true_y, logits, experts, gates = naive.dmoe(
        true_x,
        call["values"],
        true_params,
        sizes=sizes,
        unknown=options["unknown"],
        k=k,
        activation=options["activation"],
        noise_BTE=noise_BTE,
        mask_BT=mask,
        drop_BTKD=drop_BTKD,
        chosen_BTK=None if dtype == torch.float64 else chosen_BTK,
    )
    if options["residual"]:
        true_y = true_y + true_x
    pairs = {"y": (y, true_y)}
    if logits:
        pairs["logits"] = (routing.logits, torch.stack(logits))
        pairs["gates"] = (routing.gates, torch.stack(gates))
        assert routing.expert_indices.tolist() == torch.stack(experts).tolist()
    weights = {
        n: torch.randn(f.shape, generator=generator, dtype=torch.float64)
        for n, (f, _) in pairs.items()
    }
    sum((f * weights[n].to(f.dtype)).sum().double() for n, (f, _) in pairs.items()).backward()
    true_loss = sum((t * weights[n]).sum() for n, (_, t) in pairs.items())
    if true_loss.requires_grad:  # not where there are no tokens
        true_loss.backward()
    pairs["dx"] = (x.grad, zero_if_none(true_x))
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient"
        pairs[f"d{name}"] = (parameter.grad.cpu(), zero_if_none(true_params[name]))
    return pairs
