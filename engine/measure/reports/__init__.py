"""Self-contained HTML pages of results: charts that need no script and no network."""
