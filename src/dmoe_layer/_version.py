"""The version, which files that are written here name."""

__version__ = "0.2.0"
