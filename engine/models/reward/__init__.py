"""Reward models: a causal LM with a score head, trained on packed pairs; and sequence classifiers as scorers."""
