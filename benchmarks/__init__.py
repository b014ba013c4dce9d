"""Benchmarks; each is a module to run from the repository's root, `python -m benchmarks.init`."""
