"""Data: calibration samples, what they say of the operators, and factors that are made for them."""
