"""Generated text: incremental detokenisation and stop strings."""
