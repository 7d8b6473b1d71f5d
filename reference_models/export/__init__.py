"""A trained run as one file that a server runs, and that file as a network of these recipes."""
