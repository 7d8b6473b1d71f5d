"""``python -m benchmarks.volumes``: the 3D network's training step, by patch."""

import sys
from importlib.util import find_spec

if __name__ == "__main__":
    if find_spec("monai") is None:
        sys.exit(
            "python -m benchmarks.volumes: MONAI is not installed, and the 3D network is made of "
            "its blocks. Install it (pip install monai), or put it on PYTHONPATH."
        )
    from .command import main

    sys.exit(main())
