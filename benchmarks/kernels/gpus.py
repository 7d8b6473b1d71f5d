"""What GPUs of a compute capability can do, by the vendor's data sheets."""

from __future__ import annotations

import math
from typing import NamedTuple


class GPU(NamedTuple):
    """Limits; per multiprocessor where nothing else is said.

    Attributes:
        shared: bytes of shared memory.
        multiprocessors: of the whole GPU.
        bandwidth: of the whole GPU's memory, bytes a second.
        flops: of the whole GPU, by dtype. fp32 runs as three tf32 products.
    """

    shared: int
    multiprocessors: int
    bandwidth: float
    flops: dict[str, float]

    warps: int = 64
    blocks: int = 32
    registers: int = 65536

    @property
    def block_shared(self) -> int:
        """The shared memory that a block can have; the system takes 1 KiB."""
        return self.shared - 1024

    def resident_blocks(self, warps: int, registers: int, shared_bytes: int) -> int:
        """How many programs a multiprocessor holds at one time.

        Args:
            warps: of a program.
            registers: of a thread.
            shared_bytes: of a program.
        """
        # A warp's registers come in units of 256, and a block's shared memory has 1 KiB on top.
        return min(
            self.registers // (math.ceil(registers * 32 / 256) * 256 * warps),
            self.shared // (shared_bytes + 1024),
            self.warps // warps,
            self.blocks,
        )


A100 = GPU(164 << 10, 108, 2.0e12, {"fp32": 156e12 / 3, "fp16": 312e12, "bf16": 312e12})
A10 = GPU(100 << 10, 72, 0.6e12, {"fp32": 62.5e12 / 3, "fp16": 125e12, "bf16": 125e12}, 48, 16)
L40S = GPU(100 << 10, 142, 0.864e12, {"fp32": 183e12 / 3, "fp16": 362e12, "bf16": 362e12}, 48, 24)
H100 = GPU(228 << 10, 132, 3.35e12, {"fp32": 495e12 / 3, "fp16": 989e12, "bf16": 989e12})
# What its copies and products are assumed to reach; its data sheet says 4.8e12 and 989e12.
H200 = GPU(228 << 10, 132, 4.3e12, {"fp32": 495e12 / 3, "fp16": 790e12, "bf16": 790e12})
B200 = GPU(228 << 10, 148, 8.0e12, {"fp32": 1125e12 / 3, "fp16": 2250e12, "bf16": 2250e12})
GPUS = {80: A100, 86: A10, 89: L40S, 90: H100, 100: B200}  # by compute capability, times ten
