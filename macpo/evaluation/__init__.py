"""Metrics of a policy, the summary of a run, claims with intervals."""
