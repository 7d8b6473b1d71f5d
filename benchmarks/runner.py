"""Measures one shape: builds every provider, checks it, and times those that are right."""

from __future__ import annotations

from typing import Any

import torch

from . import machine, table
from .measure import Roofline, Spread, Stopwatch, interleaved, step_laps
from .problem import TOLERANCE, Layer, Problem
from .profiled import StepMemory, kernel_seconds, step_memory
from .providers import Ours, Provider, Unavailable
from .shapes import Shape
from .table import Row


def measure_shape(
    shape: Shape,
    providers: list[Provider],
    *,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    roofline: Roofline,
    facts: dict[str, str],
) -> list[Row]:
    """The rows of one shape, in the order of ``providers``."""
    problem, watch = Problem.random(shape, device.type, dtype), Stopwatch(device)
    layers: dict[str, Layer] = {}
    errors: dict[str, float | None] = {}
    memory: dict[str, StepMemory] = {}
    reasons: dict[str, str] = {}
    for provider in providers:
        try:
            layer = provider.build(problem)
            error = check(layer, provider, problem)
            if error is not None and not error <= TOLERANCE[dtype]:
                reasons[provider.name] = f"wrong (relative error {error:.1e}), not timed"
                continue
            step_laps(watch, layer.train(), problem)  # compiles and tunes what has to be
            memory[provider.name] = step_memory(layer, problem)
        except Exception as problem_with_it:
            reasons[provider.name] = _reason(problem_with_it)
            continue
        layers[provider.name], errors[provider.name] = layer, error

    laps = interleaved(
        {name: lambda layer=layer: step_laps(watch, layer, problem)  # type: ignore[misc]
         for name, layer in layers.items()},
        rounds,
    )  # fmt: skip
    spreads = {
        (name, which): Spread.of([lap[i] for lap in seconds])
        for name, seconds in laps.items()
        for i, which in enumerate(("forward", "forward+backward"))
    }
    spreads |= _router_spreads(layers, problem, watch, rounds)

    rows = []
    for provider in providers:
        common: dict[str, Any] = {
            **facts,
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": shape.name,
            "batch": shape.batch,
            "tokens": shape.tokens,
            "dim": shape.dim,
            "attribute_values": shape.values,
            "provider": provider.name,
            "version": machine.version(provider.package),
            "note": provider.note,
        }
        if provider.name in reasons:
            rows.append(Row(**common, which="", status=reasons[provider.name]))
        for (name, which), spread in spreads.items():
            if name != provider.name:
                continue
            found = table.figures(
                shape,
                which,
                spread,
                spreads.get(("mask-loop", which)),
                None if which.startswith("router") else memory[name],
                roofline,
                dtype,
                routes=provider.routes,
                counts_flops=provider.exact or not provider.routes,
            )
            rows.append(
                Row(
                    **common,
                    which=which,
                    status="timed",
                    relative_error=errors[name],
                    roofline_tflops=roofline.flops / 1e12,
                    roofline_gbytes_per_s=roofline.bytes / 1e9,
                    **found,  # type: ignore[arg-type]
                )
            )
    return rows


def check(layer: Layer, provider: Provider, problem: Problem) -> float | None:
    """The layer's largest relative error; None for other maths, which only has to run."""
    if provider.exact:
        return problem.error_of(layer, bias=provider.bias)
    x_BTD = problem.x_BTD.detach().requires_grad_()
    y_BTD = layer.train()(x_BTD, problem.attributes_B)
    y_BTD.backward(problem.dy_BTD)
    if y_BTD.shape != x_BTD.shape or not y_BTD.isfinite().all():
        raise ValueError(f"gave a shape of {tuple(y_BTD.shape)} or numbers that are not finite")
    return None


def _router_spreads(
    layers: dict[str, Layer], problem: Problem, watch: Stopwatch, rounds: int
) -> dict[tuple[str, str], Spread]:
    """Our routers alone, noise on, without gradients.

    On a GPU: all the kernels of a call, and the longest of them; Python's time is not in it.
    """
    ours = {name: layer for name, layer in layers.items() if isinstance(layer, Ours)}

    def route(layer: Ours) -> object:
        with torch.no_grad():
            return layer.route(problem.x_BTD, problem.attributes_B)

    if not watch.cuda:
        found = interleaved(
            {
                name: lambda layer=layer: watch.laps(lambda: route(layer))  # type: ignore[misc]
                for name, layer in ours.items()
            },
            rounds,
        )
        return {(name, "router"): Spread.of([lap[0] for lap in s]) for name, s in found.items()}
    spreads = {}
    for name, layer in ours.items():
        route(layer)
        # A round without kernels means that the profiler saw none of them.
        laps = kernel_seconds(lambda layer=layer: route(layer), watch, rounds)  # type: ignore[misc]
        if laps and all(laps):
            spreads[name, "router"] = Spread.of([sum(lap) for lap in laps])
            spreads[name, "router kernel"] = Spread.of([max(lap) for lap in laps])
    return spreads


def _reason(error: Exception) -> str:
    first_line = (str(error).splitlines() or [""])[0]
    if isinstance(error, Unavailable):
        return f"unavailable: {first_line}"
    if isinstance(error, ImportError):
        return f"unavailable: not installed ({first_line})"
    return f"failed: {type(error).__name__}: {first_line}"
