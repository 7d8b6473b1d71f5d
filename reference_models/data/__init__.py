"""The data sets of the reference models, one file each."""
