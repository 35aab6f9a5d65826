"""One small file per method. `streaming` is the smallest: read it first."""
