"""Token log-probabilities of a language-model head, without keeping the logits."""
