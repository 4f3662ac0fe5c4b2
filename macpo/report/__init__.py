"""report.html: the tables, charts and findings of a run."""
