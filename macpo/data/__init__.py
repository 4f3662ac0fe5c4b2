"""Preference sets in the layouts that people publish, disjoint splits, and prompts with one response."""
