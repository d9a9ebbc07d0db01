"""What a machine needs to run an exported graph. Nothing here ever imports torch or onnx."""
