"""Figures, and the pages that are made from code."""
