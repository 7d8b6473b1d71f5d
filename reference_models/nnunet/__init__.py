"""nnU-Net with experts after the stages of its encoder: trainers, and a predictor."""
