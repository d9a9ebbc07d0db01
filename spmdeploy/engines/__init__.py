"""TensorRT engines: building, records, storage."""
