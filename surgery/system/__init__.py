"""The machine: files written whole, temporary files, signals, and tables as wide as a terminal."""
