"""Commands about the installation and its recipes as such, not about a run."""
