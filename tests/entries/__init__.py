"""Both ways into the service, driven by one table of requests: our own HTTP host, and ASGI under a stock uvicorn."""
