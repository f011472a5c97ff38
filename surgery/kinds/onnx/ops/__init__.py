"""ONNX operators as functions of torch tensors, one file for each family."""
