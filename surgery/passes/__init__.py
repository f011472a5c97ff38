"""The two passes: decompose and recompose; and what comes before them: finding sites and planning."""
