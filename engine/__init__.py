"""Training, generation and scoring of Hugging Face causal LMs at scale; knows nothing of the method."""
