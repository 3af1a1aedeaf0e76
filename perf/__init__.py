"""Measurements of the kernels."""
