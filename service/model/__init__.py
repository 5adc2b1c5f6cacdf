"""One version of a model: what its folder says, how its graph is run, and what the outputs mean."""
