"""Recipes: what a run is made of, as flags and as json, and presets to start from."""
