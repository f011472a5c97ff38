"""Kinds of models: where sites are found and changes are written."""
