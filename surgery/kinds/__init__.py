"""Kinds of models: for each kind, how a model is read, run and changed."""
