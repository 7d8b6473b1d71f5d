"""Recipes: the settings of a run, as flags and as json, and presets to start from."""
