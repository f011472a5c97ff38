"""Calibration data: samples, the statistics measured on them, and factors fitted to those statistics."""
