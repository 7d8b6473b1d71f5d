"""The command `convert`: makes a folder of nnU-Net's layout from your images, masks and csv."""
