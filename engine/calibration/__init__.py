"""Calibration: the context length from which each strategy beats dense attention on a machine."""
