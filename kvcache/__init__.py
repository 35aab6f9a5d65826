"""Paged KV cache: pages of keys and values, selections of pages, and the tiers of memory that hold them.

Axis letters, used in every shape of this project:

======  ====================================  ======  =====================================
``T``   tokens in the step                    ``S``   page size, tokens
``B``   sequences                             ``P``   pages chosen
``R``   rows: queries that share a selection  ``F``   pages of the longest sequence in the step
``M``   queries per row                       ``N``   frames
``Hq``  query heads                           ``L``   layers
``Hkv`` key/value heads                       ``D``   head dim
``H``   selection heads (``Hq`` or ``Hkv``)   ``G``   ``Hq // Hkv``
======  ====================================  ======  =====================================
"""

from .allocator import FrameAllocator, OutOfFrames
from .cache import PagedCache
from .context import Context
from .errors import OffloadError, out_of_memory
from .prefix import PageKeys, PrefixCache
from .recent import Past, Recent
from .selection import Evidence, Selection
from .spec import CacheSpec
from .step import PaddedShape, Phase, Span, Step
from .tiers.base import Frames, Tier, Traffic
from .tiers.device import DeviceTier
from .tiers.multi_device import MultiDeviceTier
from .tiers.offload import OffloadTier
from .tiers.pool import PoolSize
from .tiers.store import BackingStore, HostStore

__all__ = [
    "BackingStore",
    "CacheSpec",
    "Context",
    "DeviceTier",
    "Evidence",
    "FrameAllocator",
    "Frames",
    "HostStore",
    "MultiDeviceTier",
    "OffloadError",
    "OffloadTier",
    "OutOfFrames",
    "PaddedShape",
    "PageKeys",
    "PagedCache",
    "Past",
    "Phase",
    "PoolSize",
    "PrefixCache",
    "Recent",
    "Selection",
    "Span",
    "Step",
    "Tier",
    "Traffic",
    "out_of_memory",
]
