"""The wire formats: what crosses HTTP, and nothing else."""
