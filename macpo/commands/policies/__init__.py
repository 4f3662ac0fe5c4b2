"""Policies that are opened to write and to score: of a run, of a model folder, of the Hub."""
