"""What surgery finds in a graph and what it may do to it, as plain values that know no framework."""
