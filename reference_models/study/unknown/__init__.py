"""Prediction where the attribute is not known: methods of averaging a network's outputs."""
