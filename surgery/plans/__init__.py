"""Plans: rank rules, what each site could become, and the one choice."""
