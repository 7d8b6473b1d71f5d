"""``python -m benchmarks``: the layer beside other ways to compute it."""

import sys

from .layer.command import main

if __name__ == "__main__":
    sys.exit(main())
