"""Checks and tables for a CUDA GPU; `--smoke` runs all of them on a CPU with tiny sizes."""
