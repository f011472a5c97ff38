"""Costs under onnxruntime on the CPU: small models, the timing core, latencies that are kept on disk."""
