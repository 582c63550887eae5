"""The public Wan 2.1 family: how its weights map onto our modules."""
