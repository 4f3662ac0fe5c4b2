"""How a benchmark is measured, checked and written down."""
