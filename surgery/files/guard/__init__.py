"""The guard: files of others are checked before any library opens them."""
