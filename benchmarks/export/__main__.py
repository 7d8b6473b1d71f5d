"""``python -m benchmarks.export``: exported programs beside the models they were made of."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
