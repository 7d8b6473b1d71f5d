"""What `nnUNet_extTrainer` names."""
