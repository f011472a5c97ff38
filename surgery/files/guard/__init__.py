"""The guard: checks of files from others, before any library opens them."""
