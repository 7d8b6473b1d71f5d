"""Evaluation: masks of a trained run or of any other tool, their scores and their tables."""
