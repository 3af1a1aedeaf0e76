"""Stored results: read, compared, written as Markdown and figures."""
