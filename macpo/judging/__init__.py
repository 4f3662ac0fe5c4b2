"""Judging pairs of responses by a language model: a server's, or a local one's log-probs of its verdict."""
