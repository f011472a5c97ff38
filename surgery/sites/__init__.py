"""Sites: what was found in a graph and what may happen to it, as values that know no framework."""
