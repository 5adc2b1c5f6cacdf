"""What may happen to a running service, done to a real one under load: `python -m tests.chaos`."""
