"""Layers of torch.nn: how they are read as operators, unpacked, factored and put together again."""
