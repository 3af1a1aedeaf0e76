"""Comparison of the kernels with the float64 reference."""
