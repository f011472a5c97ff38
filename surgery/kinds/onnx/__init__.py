"""ONNX models: how they are read, run and changed."""
