"""Scores: of a region, of groups, of loads; numbers in, numbers out."""
