"""People judge pairs of a run's responses, blind, on a page of their own machine: what is shown, kept and counted."""
