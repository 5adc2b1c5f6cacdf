"""For programs that call the service; see `model_service.client`."""
