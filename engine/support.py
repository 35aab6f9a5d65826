"""Combinations of options and devices that are not supported, refused before anything is loaded or started."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from .config import EngineConfig
from .devices import choose_device
from .errors import InvalidRequest

FIELD = "tensor_parallel_size"


def check_device(config: EngineConfig, device: torch.device) -> None:
    """Raises `InvalidRequest` naming what this kind of device does not have."""
    if config.cuda_graphs and device.type != "cuda":
        raise InvalidRequest("cuda_graphs", f"false on {device.type}, as only a CUDA device has them, got true")
    if config.quantization != "none" and device.type != "cpu":
        raise InvalidRequest("quantization", f"none on {device.type}, where no kernel reads {config.quantization} yet")
    if config.device_map != "none" and (device.type != "cuda" or device.index is not None):
        raise InvalidRequest("device_map", f"none on {device}, as layers are spread over all CUDA devices, got auto")


def check_ranks(config: EngineConfig) -> torch.device:
    """The kind of device that the ranks run on; raises `InvalidRequest` naming what cannot be had by several."""
    _check_options(config)
    device = _check_device(config)
    _check_process()
    return device


def _check_options(config: EngineConfig) -> None:
    size = config.tensor_parallel_size
    if config.quantization != "none":
        raise InvalidRequest("quantization", f"none with {FIELD} {size}, got {config.quantization}")
    if config.cuda_graphs:
        raise InvalidRequest("cuda_graphs", f"false with {FIELD} {size}, got true")
    if config.kv_offload is not None:
        raise InvalidRequest("kv_offload", f"none with {FIELD} {size}, got {config.kv_offload!r}")


def _check_device(config: EngineConfig) -> torch.device:
    size, device = config.tensor_parallel_size, choose_device(config.device)
    if device.index is not None:
        raise InvalidRequest("device", f"cuda with {FIELD} {size}, as each rank has its own, got {config.device!r}")
    if device.type == "cpu" and torch.cuda.is_available():
        raise InvalidRequest(
            "device", f"cuda with {FIELD} {size} where there are GPUs; hide them (CUDA_VISIBLE_DEVICES=) for cpu"
        )
    if device.type == "cuda" and size > (count := torch.cuda.device_count()):
        raise InvalidRequest(FIELD, f"at most {count}, the CUDA devices here, got {size}")
    return device


def _check_process() -> None:
    if not dist.is_available():
        raise InvalidRequest(FIELD, "1, as this torch was built without torch.distributed")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InvalidRequest(FIELD, "1 under torchrun: the engine starts its processes itself")
    if dist.is_initialized():
        raise InvalidRequest(FIELD, "1, as this process is in a process group already, of another engine perhaps")
