"""Execution of forward passes: batch to tensors, model, CUDA graphs, sampling."""
