"""Contrastive preference losses over a language-model head."""
