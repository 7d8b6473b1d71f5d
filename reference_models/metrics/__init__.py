"""Scores of a region, of groups and of the experts' loads: masks and numbers in, numbers out."""
