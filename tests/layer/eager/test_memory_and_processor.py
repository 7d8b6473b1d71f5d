"""Huge pages for large tensors, scratch rows, and what is known of the processor."""

import mmap
import platform
import sys
from pathlib import Path

import pytest
import torch

from dmoe_layer.eager import memory, processor
from dmoe_layer.eager.memory import Scratch, new_empty


def test_large_tensors_ask_for_huge_pages_inside_of_their_own_memory(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "_advise", lambda *call: asked.append(call))
    like = torch.empty(0)
    small, large = new_empty(like, (2**20,)), new_empty(like, (2**23 + 5,), torch.float32)
    assert small.shape == (2**20,)
    assert large.shape == (2**23 + 5,)
    ((start, length, _),) = asked
    assert start % mmap.PAGESIZE == 0
    assert 0 <= start - large.data_ptr() < mmap.PAGESIZE
    assert start + length == large.data_ptr() + large.nbytes
    new_empty(torch.empty(0, device="meta"), (2**24,))
    assert len(asked) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a call of Linux's")
def test_the_system_takes_the_request():
    tensor = new_empty(torch.empty(0), (2**23,))
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    # 0, or -1 where the kernel was built without huge pages.
    assert memory._advise(start, mmap.PAGESIZE, memory._MADV_HUGEPAGE) in (0, -1)
    assert tensor.fill_(1.0).sum() == 2**23


def test_without_the_system_call_tensors_are_the_same(monkeypatch):
    monkeypatch.setattr(memory, "_advise", None)
    assert new_empty(torch.empty(0, dtype=torch.float64), (2**23, 1)).dtype == torch.float64
    monkeypatch.setattr(memory.sys, "platform", "win32")
    assert memory._system_call() is None


def test_scratch_is_one_buffer_while_it_is_large_enough():
    scratch = Scratch(torch.empty(0), 3, torch.float64)
    rows = scratch.rows(10)
    assert (rows.shape, rows.dtype) == ((10, 3), torch.float64)
    assert scratch.rows(4).data_ptr() == rows.data_ptr()
    assert scratch.rows(4).shape == (4, 3)
    assert scratch.rows(11).shape == (11, 3)


CPUINFO = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\n"


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "windows", "found"),
    [
        ("x86_64", CPUINFO, "", ("x86", "AuthenticAMD", 26)),
        ("x86_64", "", "", ("x86", "", 0)),
        (
            "AMD64",
            None,
            "Intel64 Family 6 Model 165 Stepping 2, GenuineIntel",
            ("x86", "GenuineIntel", 6),
        ),
        ("AMD64", None, "", ("x86", "", 0)),
        ("aarch64", "CPU part\t: 0xd0c\n", "", ("aarch64", "", 0)),
    ],
)
def test_the_processor_is_read_from_what_the_system_tells(
    machine, cpuinfo, windows, found, monkeypatch
):
    def read_text(path, **_):
        assert str(path).endswith("cpuinfo")
        if cpuinfo is None:
            raise FileNotFoundError
        return cpuinfo

    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "processor", lambda: windows)
    monkeypatch.setattr(Path, "read_text", read_text)
    cpu = processor.processor.__wrapped__()
    assert cpu[:3] == found
    assert cpu.capability == torch.backends.cpu.get_cpu_capability()
