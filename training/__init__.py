"""Train the models that the service ships with, and publish them as TorchScript and ONNX with a manifest."""
