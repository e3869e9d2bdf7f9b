"""Benchmarks, metrics, pictures and reports."""
