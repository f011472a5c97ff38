"""torch.fx graphs: read, changed, and the kind of a GraphModule."""
