"""Benchmarks of the project beside its peers: `python -m benchmarks`, explained in README.md."""
