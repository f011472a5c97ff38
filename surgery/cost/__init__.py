"""What an operator, a chain or a model costs in time: small ONNX models, the timing core, cached latencies."""
