"""Decode attention over a block table, and the write into it."""
