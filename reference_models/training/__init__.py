"""Training: the loop, the cases that it uses, the losses, and the folder of a run."""
