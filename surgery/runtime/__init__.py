"""Running models: whole-model timing, export to ONNX, and differences between outputs."""
