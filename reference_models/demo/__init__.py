"""What `make demo` runs: four networks on real MRI that three sites outline by different rules."""
