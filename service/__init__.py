"""Serve TorchScript and ONNX models from a folder over a typed HTTP API."""

__version__ = "0.1.0"
