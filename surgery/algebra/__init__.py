"""The algebra: operators, steps and chains of them, and what they compose to. Tensors alone: no graph, no file."""
