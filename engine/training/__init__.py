"""One resumable training loop: objectives, optimiser, checkpoints, metrics, trackers."""
