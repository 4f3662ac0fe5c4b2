"""Decoding over one pool of key-value blocks, for GPUs: static steps and CUDA graphs."""
