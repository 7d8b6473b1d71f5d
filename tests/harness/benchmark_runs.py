"""Runs of the layer's benchmark in little, and rows without a run."""

import dataclasses

import pytest
import torch

from benchmarks.layer.roofline import Roofline
from benchmarks.layer.rows import LayerRow, LayerRun
from benchmarks.layer.runner import measure_shape
from benchmarks.layer.shapes import Shape
from benchmarks.machine import run_facts

CPU = torch.device("cpu")
SMALL = Shape("small", 3, 37, 16, 3)
FACTS = run_facts(CPU, torch.float32)
RUN = LayerRun(FACTS, CPU, torch.float32, rounds=2, roofline=Roofline(flops=1e11, bytes=1e10))


def rows_of(*providers):
    """What is measured of them at a small shape."""
    return measure_shape(SMALL, list(providers), RUN)


def row_of(**changes):
    """A row as if it had been measured."""
    shared = {"batch": 2, "tokens": 100, "dim": 48, "attribute_values": 4, "device": "cpu"}
    texts = {f.name: "" for f in dataclasses.fields(LayerRow) if f.type == "str"}
    timed = {"dtype": "float32", "threads": "2", "status": "timed", "median_ms": 1.0}
    return LayerRow(**{**texts, **shared, **timed, **changes})


def asks_for_the_page(command, words, monkeypatch):
    """Whether a run of a command may write where the page shows it; it ends before it measures."""

    class Chosen(Exception):
        pass

    def chosen(out, whole):
        raise Chosen(whole)

    monkeypatch.setattr(command.ResultsFolder, "chosen", chosen)
    with pytest.raises(Chosen) as asked:
        command.main(words)
    return asked.value.args[0]
