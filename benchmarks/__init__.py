"""Measurements of patched models against others, in one process: `python -m benchmarks --help`."""
