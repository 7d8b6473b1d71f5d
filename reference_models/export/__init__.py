"""Exports a trained run as one file for a server, and runs such a file as a network here."""
