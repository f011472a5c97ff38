"""The kind of nn.Modules."""
