"""Bound of the compiled kernels that torch keeps for products in 16 bits on a CPU."""

from __future__ import annotations

import os

VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Settings of oneDNN and of its wrapper in torch, which keep 1,024 kernels each by default."""
KERNELS = 32


def bound_kernel_cache() -> None:
    """Have both keep few kernels, unless their variables are set. They are read at the first product of a process.

    oneDNN compiles a kernel, of half a MiB with its working memory, for every weight and number of rows: the last
    chunk of a prompt has any. With the embedded model's shapes, 300 lengths of prompts took 670 MiB, and 57 MiB so; one
    bound alone does not do. Compiling again takes no time that could be measured beside the products.
    """
    for variable in VARIABLES:
        os.environ.setdefault(variable, str(KERNELS))
