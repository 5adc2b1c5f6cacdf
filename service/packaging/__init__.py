"""`python -m service package`: a model of your own gets a manifest and a place in the folder."""
