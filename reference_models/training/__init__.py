"""Training: the loop, whom it learns from, what it minimises, and the folder of a run."""
