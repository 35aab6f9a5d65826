"""Fingerprint of a model: equal for equal weights in the same precision."""

from __future__ import annotations

import hashlib
from typing import Any

from .shards import own


def fingerprint(module: Any, quantization: str) -> str:
    """A digest of the configuration and of up to 64 numbers of every parameter, so that large files stay unread.

    With tensor parallelism it is that of this rank's part, whose shapes set it apart from that of the whole model.
    """
    digest = hashlib.sha256(module.config.to_json_string().encode())
    for name, parameter in module.named_parameters():
        part = own(parameter).detach()
        flat = part.flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
        digest.update(f"{name}{tuple(part.shape)}{part.dtype}{sample.tolist()}".encode())
    return f"{digest.hexdigest()[:16]}-{quantization}".removesuffix("-none")
