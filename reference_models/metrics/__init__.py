"""Computes scores of regions, of groups and of the experts' loads, from masks and numbers."""
