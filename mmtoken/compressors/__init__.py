"""Compressors: one paper, one file."""
