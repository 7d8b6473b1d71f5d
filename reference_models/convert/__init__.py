"""Makes a folder in nnU-Net's layout of images, masks and a csv that lie otherwise."""
