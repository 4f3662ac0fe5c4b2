"""The method: what each stage reads, does and writes, and what it costs."""
