"""A run's facts name the processor, its instruction set, what holds it back, and the road."""

import dataclasses

import pytest
import torch
from harness.benchmark_runs import CPU

from benchmarks import machine
from benchmarks.machine import device_kind, held_to, run_facts, vendor

CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC

processor\t: 1
vendor_id\t: Other
"""


def test_capability_road_and_vendor_are_those_of_this_process(monkeypatch):
    monkeypatch.setattr(machine, "road", lambda: "linear layers by hand")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    facts = run_facts(CPU, torch.float32)
    assert (facts.capability, facts.road) == ("AVX2", "linear layers by hand")
    assert facts.vendor == vendor() != ""
    assert facts.hardware().endswith(
        "AVX2); matrix products of this layer by linear layers by hand"
    )
    for name in ("vendor", "capability", "road"):
        assert f"{name} {getattr(facts, name)}" in facts.one_line()
    # Of other dtypes the layer does not choose.
    assert run_facts(CPU, torch.bfloat16).road == "plain PyTorch"


def test_the_layer_names_its_road():
    assert any(library in machine.road() for library in ("oneDNN", "BLAS", "PyTorch"))


def test_the_vendor_is_the_first_processors(monkeypatch, tmp_path):
    listed = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "CPUINFO", listed)
    listed.write_text(CPUINFO, encoding="utf-8")
    assert vendor() == "AuthenticAMD family 25 model 17"
    listed.write_text("CPU implementer\t: 0x41\n", encoding="utf-8")
    monkeypatch.setattr(machine.platform, "processor", lambda: "aarch64")
    assert vendor() == "aarch64"
    listed.unlink()
    assert vendor() == "aarch64"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, ""),
        ({"ATEN_CPU_CAPABILITY": ""}, ""),
        (
            {
                "MKL_ENABLE_INSTRUCTIONS": "AVX2",
                "ATEN_CPU_CAPABILITY": "avx2",
                "ONEDNN_MAX_CPU_ISA": "AVX2",
            },
            ", held to AVX2 by ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY and "
            "MKL_ENABLE_INSTRUCTIONS",
        ),
        (
            {"DNNL_MAX_CPU_ISA": "AVX512_CORE", "ATEN_CPU_CAPABILITY": "default"},
            ", held to AVX512_CORE by DNNL_MAX_CPU_ISA, held to DEFAULT by ATEN_CPU_CAPABILITY",
        ),
    ],
)
def test_what_holds_a_library_to_fewer_instructions_is_said(environment, said, monkeypatch):
    assert held_to(environment) == said
    for name in machine.HELD_BY:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    facts = run_facts(CPU, torch.float32)
    assert facts.machine == machine.machine_name(CPU) + said
    assert facts.hardware().startswith(facts.machine)


@pytest.mark.parametrize(
    ("capability", "kind"),
    [("AVX2", "cpu-avx2"), ("AVX512", "cpu-avx512"), ("NO AVX", "cpu-no-avx")],
)
def test_files_are_named_by_the_instruction_set(capability, kind, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert device_kind(CPU) == kind


def test_of_a_gpu_its_compute_capability_is_named(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    facts = run_facts(gpu, torch.bfloat16)
    assert (facts.machine, facts.vendor, facts.capability, facts.road) == ("H200", "", "9.0", "")
    assert facts.hardware() == "H200 (9.0)"
    assert device_kind(gpu) == "cuda"


def test_facts_that_an_older_file_lacks_leave_no_empty_brackets():
    facts = run_facts(CPU, torch.float32)
    older = dataclasses.replace(facts, machine="AMD EPYC", vendor="", capability="", road="")
    assert older.hardware() == "AMD EPYC"
