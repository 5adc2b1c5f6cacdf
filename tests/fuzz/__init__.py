"""Random requests, drawn from the service's own description of itself."""
