"""Adapters to other packages, each imported only when it is built, and never required.

All but st-moe bring experts without a router: they get this package's. None drops entries of an
expert's output, so that in training the sum over experts is dropped instead, which is less work.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..paper import experts_of_modules
from .problem import Problem
from .provider import Layer, Provider, Routed, Unavailable

# What st-moe's dispatch and combine tensors may take; they have T·E·capacity entries each.
_MOST_DISPATCH_BYTES = 2**29
_GROUP_TOKENS = 512
# Pairs of token and slot, and the time of each in a step: not measured, but estimated from a wait
# for memory of 0.6 µs for each row of an expert, of which there are eight, and of each bias.
_MOST_INDEXED, _INDEXED_SECONDS = 2**18, 2 * 0.6e-6 / 8


class Transformers(Routed):
    """Hugging Face transformers' grouped experts: its grouped_mm implementation, with biases."""

    def __init__(self, problem: Problem) -> None:
        from transformers.integrations import use_experts_implementation

        pairs = problem.shape.total_tokens * problem.shape.k
        if problem.device.type == "cuda" and pairs > _MOST_INDEXED:
            raise Unavailable(
                "it adds biases by an index, whose gradient a GPU sums one row after the other: "
                f"{pairs:,} rows are estimated to take {_INDEXED_SECONDS * pairs:.1f} s"
            )
        super().__init__(problem)
        owner = self

        @use_experts_implementation(has_bias=True, has_gate=False)
        class Experts(nn.Module):
            def __init__(self, config: Any) -> None:
                super().__init__()
                self.num_experts, self.act_fn = owner.n_experts, F.relu
                self.up_proj, self.up_proj_bias = owner.w1_EHD, owner.w1_bias
                self.down_proj, self.down_proj_bias = owner.w2_EDH, owner.w2_bias

            def forward(self, x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor) -> Tensor:
                raise NotImplementedError  # replaced by the implementation of the config's name

        self.hf_experts = Experts(SimpleNamespace(_experts_implementation="grouped_mm"))

    def experts(self, x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor) -> Tensor:
        return self.drop(self.hf_experts(x_TD, indices_TK, gates_TK))


class ScatterMoE(Routed):
    """ScatterMoE's MLP, with biases."""

    def __init__(self, problem: Problem) -> None:
        from scattermoe.mlp import MLP

        _need_gpu(problem)
        super().__init__(problem)
        self.mlp = MLP(
            input_size=problem.shape.dim,
            hidden_size=problem.shape.hidden,
            num_experts=self.n_experts,
            top_k=self.k,
            bias=True,
            activation=nn.ReLU(),
        )
        self.mlp.experts.weight, self.mlp.experts.bias = self.w1_EHD, self.w1_bias
        self.mlp.output_experts.weight, self.mlp.output_experts.bias = self.w2_EDH, self.w2_bias

    def experts(self, x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor) -> Tensor:
        return self.drop(self.mlp(x_TD, gates_TK, indices_TK))


class SonicMoE(Routed):
    """SonicMoE's experts on routing from outside, with biases."""

    def __init__(self, problem: Problem) -> None:
        from sonicmoe import moe_general_routing_inputs
        from sonicmoe.enums import ActivationType

        _need_gpu(problem)
        super().__init__(problem)
        self.run, self.relu = moe_general_routing_inputs, ActivationType.RELU

    def experts(self, x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor) -> Tensor:
        token_R = torch.arange(len(x_TD), device=x_TD.device, dtype=torch.int32)
        y_TD, _ = self.run(
            x_TD,
            gates_TK.flatten(),
            token_R.repeat_interleave(self.k),
            indices_TK.flatten().int(),
            self.w1_EHD.permute(1, 2, 0),
            self.w1_bias,
            self.w2_EDH.permute(1, 2, 0),
            self.w2_bias,
            E=self.n_experts,
            stream_id=torch.cuda.current_stream().cuda_stream,
            activation_type=self.relu,
            is_inference_mode_enabled=not torch.is_grad_enabled(),
        )
        return self.drop(y_TD)


class MegaBlocks(Routed):
    """MegaBlocks' dropless experts by grouped GEMM, which have no biases."""

    def __init__(self, problem: Problem) -> None:
        from megablocks.layers.arguments import Arguments
        from megablocks.layers.dmoe import ParallelDroplessMLP

        _need_gpu(problem)
        super().__init__(problem)
        self.mlp = ParallelDroplessMLP(
            Arguments(
                hidden_size=problem.shape.dim,
                ffn_hidden_size=problem.shape.hidden,
                bias=False,
                return_bias=False,
                activation_fn=F.relu,
                moe_num_experts=self.n_experts,
                moe_top_k=self.k,
                moe_loss_weight=0.0,
                memory_optimized_mlp=True,
                mlp_impl="grouped",
                fp16=problem.dtype == torch.float16,
                bf16=problem.dtype == torch.bfloat16,
                device=problem.device,
            )
        )
        self.mlp.mlp.w1 = nn.Parameter(self.w1_EHD.detach().flatten(0, 1))
        self.mlp.mlp.w2 = nn.Parameter(self.w2_EDH.detach().mT.flatten(0, 1))

    def experts(self, x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor) -> Tensor:
        return self.drop(self.mlp(x_TD[None], None, gates_TK, indices_TK)[0])

    def w1_grad(self) -> Tensor:
        grad: Tensor = self.mlp.mlp.w1.grad
        return grad.view_as(self.w1_EHD)


class StMoe(Layer):
    """st-moe-pytorch with its own router and these experts, at its default capacity.

    Below fp32 it runs under autocast, since its gates are fp32.

    Its dispatch tensors grow with the square of the tokens in a sequence, so long ones are cut
    into groups, as in the paper it follows.
    """

    def __init__(self, problem: Problem) -> None:
        from st_moe_pytorch import MoE

        super().__init__()
        shape = problem.shape
        self.group = _group(shape.tokens)
        capacity = max(int(self.group * 1.25 / shape.experts), 4)
        needed = 2 * shape.total_tokens * shape.experts * capacity * problem.x_BTD.element_size()
        if needed > _MOST_DISPATCH_BYTES:
            raise Unavailable(f"its dispatch tensors would take {needed / 2**30:.1f} GiB")
        weights = {name: weight.float() for name, weight in problem.weights.items()}
        experts = experts_of_modules(weights)
        sizes = {"num_experts": shape.experts, "gating_top_n": shape.k}
        self.moe = MoE(shape.dim, **sizes, experts=experts)
        self.moe.to(problem.device)
        self.autocast = torch.autocast(
            problem.device.type, problem.dtype, enabled=problem.dtype != torch.float32
        )

    def forward(self, x_BTD: Tensor, attributes_B: Tensor) -> Tensor:
        x_GTD = x_BTD.reshape(-1, self.group, x_BTD.shape[-1])
        with self.autocast:
            y_GTD: Tensor = self.moe(x_GTD, noise_gates=self.training).outputs
        return y_GTD.view_as(x_BTD)


def _group(tokens: int) -> int:
    """The tokens of a group: all of a short sequence, else as many as divide it, 512 at most."""
    return tokens if tokens <= 2 * _GROUP_TOKENS else math.gcd(tokens, _GROUP_TOKENS)


def _need_gpu(problem: Problem) -> None:
    if problem.device.type == "cpu":
        raise Unavailable("its kernels run on a GPU only")


_NOTE = "our router; dropout after the sum"
PEERS = [
    Provider("transformers", Transformers, _NOTE, package="transformers"),
    Provider("scattermoe", ScatterMoE, _NOTE, package="scattermoe"),
    Provider("sonicmoe", SonicMoE, _NOTE, package="sonic-moe"),
    Provider("megablocks", MegaBlocks, f"{_NOTE}; no biases", bias=False, package="megablocks"),
    Provider(
        "st-moe",
        StMoe,
        "other maths: no attributes, drops tokens over its capacity",
        exact=False,
        package="st-moe-pytorch",
    ),
]
