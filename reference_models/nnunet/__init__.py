"""nnU-Net with experts behind its encoder's stages: trainers, and a predictor."""
