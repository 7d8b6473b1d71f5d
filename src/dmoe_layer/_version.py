"""The version, which files that are written here name."""

__version__ = "0.1.0"
