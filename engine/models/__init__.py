"""Any Hugging Face causal LM as a policy: load it, adapt it, spread it over GPUs, save it; its FLOP."""
