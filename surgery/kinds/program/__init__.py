"""The kind of torch.export's programs."""
