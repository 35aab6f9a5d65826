"""Measurement of models and strategies: evaluation, profiling, reports."""
