"""Reference models and programs that show what `dmoe_layer` does, through its public names only."""
