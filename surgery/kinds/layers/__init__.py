"""Layers of torch.nn: read as operators, followed, taken apart, put together again."""
