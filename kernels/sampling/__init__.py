"""Drawing tokens: filters, noise seeded per request, log-probabilities."""
