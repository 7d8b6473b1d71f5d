"""``python -m benchmarks.volumes``: the 3D network's training step, by patch."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
