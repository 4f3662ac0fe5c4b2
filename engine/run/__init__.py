"""A run in its folder: stages and their keys, manifests, and what is done, stale or to be resumed."""
