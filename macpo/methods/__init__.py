"""Methods of weak-to-strong alignment as stage graphs, each beside its paper; MACPO's own is macpo/iteration.py."""
