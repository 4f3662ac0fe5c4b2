"""Scorers of responses: what they are, their stages, and the reward model that a run trains for itself."""
