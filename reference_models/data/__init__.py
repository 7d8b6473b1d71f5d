"""Data sets for the reference models: `open_dataset` opens any of them, and all give `Sample`s.

A data set is one file here and one row of the table in `datasets.py`.
"""

from .datasets import DataSettings, open_dataset
from .phantom import PhantomSettings

__all__ = ["DataSettings", "PhantomSettings", "open_dataset"]
