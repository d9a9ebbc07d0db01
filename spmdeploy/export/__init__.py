"""Export of weights to bundles: tracing, ONNX, FP16, parity checks."""
