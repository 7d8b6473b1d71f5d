"""Prediction where the attribute is not known: ways to average what a network says."""
