"""How cost grows with tokens, experts, k, attribute values and width: `benchmarks.growth`."""
