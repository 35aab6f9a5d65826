"""Replacement of a model's modules by those that are fast at decode on a CPU."""

from __future__ import annotations

from torch import nn

from . import quantized
from .heap import release_heap
from .linear import native_kernel, swap_linears


def swap_modules(module: nn.Module, quantization: str, *, layers: bool) -> None:
    """Swap linear layers and, with `layers`, whole decoder layers; ``int8`` quantizes the weights first.

    Does only the quantization where the native library is not built.
    """
    if quantization == "int8":
        quantized.swap_linears(module)
        release_heap()  # of the weights as they were, unless they lie in a file
    if (kernel := native_kernel()) is None:
        return
    swap_linears(module, kernel)
    if layers:
        from .decode_layer import swap_layers

        swap_layers(module)
