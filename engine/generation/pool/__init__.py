"""Decoding over one pool of key-value blocks, for GPUs, with static steps and CUDA graphs."""
