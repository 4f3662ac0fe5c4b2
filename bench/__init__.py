"""Benchmarks beside their peers, and the ahead-of-time compile report. Run from the repository: `python -m bench.x`."""
