"""What a training step needs before it runs: memory, time, and which settings fit."""
