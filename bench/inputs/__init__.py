"""What benchmarks run on: heads, attention rows, pairs, requests."""
