"""Solvers: pure tensor code that finds the factors of a batch of matrices or tensors."""
