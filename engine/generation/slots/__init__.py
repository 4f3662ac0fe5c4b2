"""Decoding with one contiguous key-value slot per sequence, for CPUs."""
