"""One layer at a time: attention of prompts and of single tokens, indexes, and dense kernels."""
