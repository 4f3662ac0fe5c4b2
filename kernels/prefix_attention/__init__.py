"""Attention over prompt groups: one prompt shared by n responses."""
