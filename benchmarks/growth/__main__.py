"""``python -m benchmarks.growth``: how time and memory grow with each number of a layer."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
