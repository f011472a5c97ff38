"""torch.fx graphs: how they are read, run and changed; and the kind of GraphModules."""
