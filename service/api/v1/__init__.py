"""The typed API: instances in; predictions, probabilities and labels out."""
