"""Weights to bundle: deploy graph, ONNX, FP16, parity, pipeline."""
