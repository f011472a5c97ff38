"""Model surgery: decompose, recompose and time exported neural networks."""
