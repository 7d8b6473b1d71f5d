"""Models that somebody else wrote: which modules are meant, what they compute, where MLPs stand."""
