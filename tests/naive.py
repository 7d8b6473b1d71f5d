"""The truth: one token at a time, in plain PyTorch; nothing here is fast, all of it is short.

Everything is differentiable, so that autograd gives the true gradients too. Run it in fp64.
"""

import torch
import torch.nn.functional as F


def gated(activation):
    """The first half of z, activated, times the second half."""
    return lambda z: activation(z[: len(z) // 2]) * z[len(z) // 2 :]


ACTIVATIONS = {
    "relu": lambda z: z.clamp(min=0),
    "gelu": lambda z: 0.5 * z * (1 + torch.erf(z / 2**0.5)),
    "gelu_tanh": lambda z: (
        0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
    ),
    "quick_gelu": lambda z: z / (1 + torch.exp(-1.702 * z)),
    "silu": lambda z: z / (1 + torch.exp(-z)),
}
ACTIVATIONS["swiglu"] = gated(ACTIVATIONS["silu"])
ACTIVATIONS["geglu"] = gated(ACTIVATIONS["gelu"])
ACTIVATIONS["geglu_tanh"] = gated(ACTIVATIONS["gelu_tanh"])


def router_weights(w_A2ED, b_A2E, sizes, unknown, values):
    """The clean and noise router of one sample, (2, E, D) and (2, E): a sum over attributes."""
    if sizes is None:
        return w_A2ED[0], b_A2E[0]
    w, b, start = 0.0, 0.0, 0
    for i, (size, value) in enumerate(zip(sizes, values, strict=True)):
        if value >= 0:
            w, b = w + w_A2ED[start + value], b + b_A2E[start + value]
        elif unknown == "average":
            rows = slice(start, start + size)
            w, b = w + w_A2ED[rows].mean(dim=0), b + b_A2E[rows].mean(dim=0)
        else:  # learned: one row an attribute, after all the values' rows
            w, b = w + w_A2ED[sum(sizes) + i], b + b_A2E[sum(sizes) + i]
        start += size
    return w, b


def dmoe(
    x_BTD,
    values,
    params,
    *,
    sizes,
    unknown,
    k,
    activation,
    noise_BTE=None,
    mask_BT=None,
    drop_BTKD=None,
    chosen_BTK=None,
):
    """y (B, T, D) and the logits, experts and gates of every token inside the mask.

    ``values[b]`` is a list of ints, ``noise_BTE`` the standard normal draws, ``drop_BTKD`` the
    factors of dropout. ``chosen_BTK`` fixes the experts, where low precision may break a tie in
    another way.
    """
    y_BTD = torch.zeros_like(x_BTD)
    logits, experts, gates = [], [], []
    for b in range(x_BTD.shape[0]):
        w_2ED, b_2E = router_weights(
            params["router.w_A2ED"], params["router.bias"], sizes, unknown, values[b]
        )
        for t in range(x_BTD.shape[1]):
            if mask_BT is not None and not mask_BT[b, t]:
                continue
            x = x_BTD[b, t]
            scores = w_2ED[0] @ x + b_2E[0]
            if noise_BTE is not None:
                scores = scores + noise_BTE[b, t] * F.softplus(w_2ED[1] @ x + b_2E[1])
            chosen = scores.topk(k).indices if chosen_BTK is None else chosen_BTK[b, t]
            gate = torch.exp(scores[chosen]) / torch.exp(scores[chosen]).sum()
            for j, e in enumerate(chosen.tolist()):
                z = params["w1_EHD"][e] @ x
                if "w1_bias" in params:
                    z = z + params["w1_bias"][e]
                out = params["w2_EDH"][e] @ ACTIVATIONS[activation](z)
                if "w2_bias" in params:
                    out = out + params["w2_bias"][e]
                if drop_BTKD is not None:
                    out = out * drop_BTKD[b, t, j]
                y_BTD[b, t] += gate[j] * out
            logits.append(scores)
            experts.append(chosen)
            gates.append(gate)
    return y_BTD, logits, experts, gates


def load_balancing_loss(logits, experts, n_experts):
    """E · Σ_e f_e · P_e over a list of tokens."""
    assigned = torch.cat(experts).tolist()
    probabilities = [torch.softmax(scores, dim=-1) for scores in logits]
    loss = 0.0
    for e in range(n_experts):
        share = assigned.count(e) / len(assigned)
        loss = loss + share * sum(p[e] for p in probabilities) / len(logits)
    return n_experts * loss
