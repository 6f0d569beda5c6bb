"""Benchmarks, tuners, comparisons and plots."""
