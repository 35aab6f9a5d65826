"""Modules that replace a model's own where a CPU decodes faster with them."""
