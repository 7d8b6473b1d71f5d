"""A GPU of compute capability 9.0 for Triton where there is none: kernels compile, nothing runs.

Imported before a kernel is launched, in a process of its own that is not in interpreter mode.
"""

from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Utils:
    """What Triton asks of a device."""

    def load_binary(self, name, kernel, shared, device):
        return 0, 0, 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32}


class Launcher:
    """In place of what is compiled in C for each kernel."""

    launch_cooperative_grid = False

    def __init__(self, source, metadata):
        pass

    def __call__(self, *arguments):
        pass


class FakeGpu:
    """The driver."""

    launcher_cls = Launcher
    utils = Utils()

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


driver.set_active(FakeGpu())
