"""What operators, chains and models cost in time."""
