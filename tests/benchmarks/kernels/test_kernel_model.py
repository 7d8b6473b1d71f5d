"""What the kernels' report works out from a binary, by hand and for the committed report."""

import pytest
from harness.kernel_reports import committed_rows

from benchmarks.kernels.gpus import A100, GPUS
from benchmarks.kernels.work import LATENCY, Work, kernel_work, roofline_share


@pytest.mark.parametrize(
    ("warps", "registers", "shared_bytes", "blocks"),
    [
        (4, 128, 0, 4),  # 65536 registers, of which a block takes 4·32·128
        (4, 121, 0, 4),  # a warp's come in units of 256: 121·32 are rounded up to 4096
        (4, 16, 40 << 10, 4),  # 164 KiB, of which a block takes 41
        (16, 16, 0, 4),  # 64 warps
        (1, 16, 0, 32),  # no more than 32 blocks
    ],
)
def test_as_many_blocks_are_resident_as_the_scarcest_allows(warps, registers, shared_bytes, blocks):
    assert A100.resident_blocks(warps, registers, shared_bytes) == blocks


def test_the_share_of_the_roofline_is_lost_to_padding_or_to_waiting():
    flops = A100.flops["bf16"]
    padded = Work(operations=1e6, useful=0.75, loaded=100, stored=100, rows=10**6)
    assert roofline_share(padded, flops, A100, resident=8) == 0.75
    # One tile of 64 bytes on its way a multiprocessor: what arrives in each LATENCY.
    waiting = Work(operations=0, useful=1, loaded=64, stored=64, rows=1)
    bandwidth = 64 * A100.multiprocessors / LATENCY
    share = roofline_share(waiting, flops, A100, resident=1)
    assert share == pytest.approx(bandwidth / A100.bandwidth, abs=5e-4)


def test_the_reductions_have_no_share():
    assert kernel_work("sum_chunks_kernel", {}, 24, 4) is None


def test_the_committed_occupancy_follows_from_the_committed_columns():
    rows = committed_rows()
    assert rows
    for row in rows:
        gpu = GPUS[row.capability]
        resident = gpu.resident_blocks(row.warps, row.registers, row.shared_bytes)
        assert row.occupancy == float(f"{resident * row.warps / gpu.warps:.5g}"), row
