"""What the engine does with each model family of transformers: `python -m bench.compatibility` writes the page."""
