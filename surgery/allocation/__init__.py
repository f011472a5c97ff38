"""Allocation: what each site could become, at which damage and cost, and the one choice for all that fits best."""
