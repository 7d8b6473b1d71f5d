"""One shape's random input and parameters, the same for every provider, and the true answer.

The answer is checked at the full shape: y's gradient is zero but for some tokens, so that these
tokens alone decide every gradient, and the truth is needed for them only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dmoe_layer import DMoE

from ..paper import K
from .shapes import Shape

CHECKED_TOKENS = 256
# How far the last expert chosen must lead the next one, for low precision may break ties in
# another way; and, from fp32 on, how far hidden units must be from ReLU's kink.
_MARGIN = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_KINK = {torch.float64: 1e-12, torch.float32: 1e-5}


@dataclass
class Answer:
    """Output and gradients of the checked tokens; w1's gradient is the sum over them."""

    y_TD: Tensor
    dx_TD: Tensor
    dw1_EHD: Tensor


@dataclass
class Problem:
    """Random x, attributes, y's gradient and the parameters of a DMoE, in one dtype."""

    shape: Shape
    x_BTD: Tensor
    dy_BTD: Tensor
    attributes_B: Tensor
    weights: dict[str, Tensor]
    _answers: dict[bool, Answer] = field(default_factory=dict)
    _tokens: Tensor | None = None

    @classmethod
    def random(cls, shape: Shape, device: str, dtype: torch.dtype, seed: int = 0) -> Problem:
        """The same numbers for the same seed. Attributes stay on the CPU, as a loader has them."""
        torch.manual_seed(seed)
        layer = DMoE(shape.dim, n_experts=shape.experts, k=shape.k, attribute_sizes=shape.values)
        weights = {n: p.detach().to(device, dtype) for n, p in layer.state_dict().items()}
        size = (shape.batch, shape.tokens, shape.dim)
        x_BTD, dy_BTD = (torch.randn(size, device=device, dtype=dtype) for _ in range(2))
        attributes_B = torch.arange(shape.batch) % shape.values
        return cls(shape, x_BTD.requires_grad_(), dy_BTD, attributes_B, weights)

    @property
    def device(self) -> torch.device:
        return self.x_BTD.device

    @property
    def dtype(self) -> torch.dtype:
        return self.x_BTD.dtype

    def answer(self, bias: bool) -> Answer:
        """The truth for the checked tokens, with or without the experts' biases."""
        if bias not in self._answers:
            tokens_T = self.checked_tokens()
            dy_TD = self.dy_BTD.flatten(0, 1)[tokens_T].double()
            x_TD, values_T = self._tokens_and_values(tokens_T)
            self._answers[bias] = true_answer(
                x_TD, values_T, dy_TD, self.weights, k=self.shape.k, bias=bias
            )
        return self._answers[bias]

    def checked_tokens(self) -> Tensor:
        """Random tokens for which rounding changes neither the experts nor a ReLU."""
        if self._tokens is None:
            total = self.shape.total_tokens
            candidates_T = torch.randperm(total)[: 2 * CHECKED_TOKENS].to(self.device)
            x_TD, values_T = self._tokens_and_values(candidates_T)
            scores_TE = _scores(x_TD, values_T, self.weights)
            ranked_TE = scores_TE.sort(dim=-1, descending=True)
            k = self.shape.k
            lead_T = (ranked_TE.values[:, k - 1 : -1] - ranked_TE.values[:, k:])[:, :1]
            clear_T = (lead_T > _MARGIN[self.dtype]).all(dim=-1)  # also where all are chosen
            if kink := _KINK.get(self.dtype):
                for biased in (True, False):
                    z_TEH = _hidden(x_TD, self.weights, bias=biased)
                    near_TE = z_TEH.abs().amin(dim=-1) < kink
                    clear_T &= ~near_TE.gather(1, ranked_TE.indices[:, :k]).any(dim=-1)
            self._tokens = candidates_T[clear_T][:CHECKED_TOKENS]
            if not len(self._tokens):
                raise ValueError(f"shape: got {self.shape}, which has no token to check with.")
        return self._tokens

    def _tokens_and_values(self, tokens_T: Tensor) -> tuple[Tensor, Tensor]:
        values_T = self.attributes_B.to(self.device)[tokens_T // self.shape.tokens]
        return self.x_BTD.detach().flatten(0, 1)[tokens_T].double(), values_T


def true_answer(
    x_TD: Tensor,
    values_T: Tensor,
    dy_TD: Tensor,
    weights: dict[str, Tensor],
    *,
    k: int = K,
    bias: bool = True,
) -> Answer:
    """Every expert on every token in fp64, weighted with the gates: the formula, written out."""
    x_TD = x_TD.double().requires_grad_()
    weights = {**weights, "w1_EHD": weights["w1_EHD"].double().requires_grad_()}
    scores_TE = _scores(x_TD, values_T, weights)
    best_TK = scores_TE.topk(k, dim=-1)
    gates_TE = torch.zeros_like(scores_TE).scatter(
        1, best_TK.indices, best_TK.values.softmax(dim=-1)
    )
    h_TEH = _hidden(x_TD, weights, bias=bias).relu()
    out_TED = torch.einsum("teh,edh->ted", h_TEH, weights["w2_EDH"].double())
    if bias:
        out_TED = out_TED + weights["w2_bias"].double()
    y_TD = torch.einsum("te,ted->td", gates_TE, out_TED)
    dx_TD, dw1_EHD = torch.autograd.grad(y_TD, (x_TD, weights["w1_EHD"]), dy_TD)
    return Answer(y_TD.detach(), dx_TD, dw1_EHD)


def _scores(x_TD: Tensor, values_T: Tensor, weights: dict[str, Tensor]) -> Tensor:
    w_TED = weights["router.w_A2ED"][values_T, 0].double()
    return (w_TED @ x_TD[:, :, None])[:, :, 0] + weights["router.bias"][values_T, 0].double()


def _hidden(x_TD: Tensor, weights: dict[str, Tensor], *, bias: bool) -> Tensor:
    z_TEH = torch.einsum("td,ehd->teh", x_TD, weights["w1_EHD"].double())
    return z_TEH + weights["w1_bias"].double() if bias else z_TEH
