"""Fused preference-training operators; see each operator's `op.py` for its contract."""
