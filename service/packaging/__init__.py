"""Package your own model: `python -m service package` writes its manifest and adds it to the models folder."""
