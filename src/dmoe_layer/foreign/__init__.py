"""Reads models of other libraries: finds the modules of a pattern, and the MLPs in them."""
