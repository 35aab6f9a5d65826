"""Loading any decoder of transformers, with its attention swapped for ours."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from .. import ranks as group
from ..config import EngineConfig
from ..devices import choose_device, choose_dtype
from ..errors import InvalidRequest, ModelNotFound, Unsupported
from ..support import check_device
from . import key_bias, placement, seam
from .cpu import quantized
from .cpu.heap import release_heap
from .cpu.linear import native_kernel, swap_linears
from .loaded import LoadedModel
from .rope import stretch
from .seam import AttentionCall
from .shards import check_split, own
from .source import Source, locate
from .tokenizer import Tokenizer

Report = Callable[[str], None]
LAYER_TYPES = {"full_attention", "sliding_attention"}


def load(config: EngineConfig, report: Report) -> LoadedModel:
    """The model that `config` names, ready to run; `report` hears what takes time.

    Raises `ModelNotFound`, `Unsupported` naming what cannot be honoured, or `InvalidRequest` naming the field.
    """
    ranks = config.tensor_parallel_size
    device = group.local_device(choose_device(config.device), ranks)
    check_device(config, device)
    source = locate(config.model, report)
    report(f"loading {source.name}")
    module, unexpected = _load_module(source, config, device)
    text = module.config.get_text_config(decoder=True)
    calls = _check_calls(seam.probe(module, device), text)
    max_model_len = _max_model_len(config.max_model_len, text)
    _check_rotary(module, max_model_len)
    bias_channels = _attach_bias(module, source, unexpected, calls)
    placement.check_placed(module, biased=bias_channels > 0)
    check_split(calls[0], text, ranks, biased=bias_channels > 0)
    fingerprint = f"{_fingerprint(module)}-{config.quantization}".removesuffix("-none")
    if ranks == 1:  # layers that several processes share stay transformers' own
        _swap(module, device, config.quantization, layers=not bias_channels)
    if bias_channels and max_model_len > key_bias.TRAINED_LEN:
        report(f"{source.name} was trained on {key_bias.TRAINED_LEN} tokens, max_model_len is {max_model_len}")
    return LoadedModel(
        name=config.served_model_name or source.name,
        module=module,
        tokenizer=_load_tokenizer(source, config.trust_remote_code),
        max_model_len=max_model_len,
        vocab_size=text.vocab_size,
        dtype=module.dtype,
        device=device,
        eos_token_ids=_eos_token_ids(module),
        **seam.facts(calls),
        fingerprint=fingerprint,
        bias_channels=bias_channels,
        ranks=ranks,
    )


def _load_module(source: Source, config: EngineConfig, device: torch.device) -> tuple[Any, list[str]]:
    """The module of `source`, in evaluation mode, and tensors that it does not know. Weights: safetensors or GGUF."""
    seam.register()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with key_bias.hold_report() as held:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.path,
                config=_stretched(source, config),
                gguf_file=source.gguf_file,
                dtype=choose_dtype(config.dtype, device),
                **placement.placed(config, device),
                attn_implementation=seam.NAME,
                use_safetensors=None if source.gguf_file else True,
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
            )
    except OSError as error:
        raise ModelNotFound(f"{source.name}: {error}") from error
    except InvalidRequest:
        raise
    except (ValueError, KeyError) as error:
        raise Unsupported(f"{source.name}: {str(error).splitlines()[0]}") from error
    module, loading = loaded
    if module.config._attn_implementation != seam.NAME:
        raise Unsupported(f"{type(module).__name__}: its attention cannot be swapped")
    key_bias.release_report(held, loading)
    return module.eval().requires_grad_(False), list(loading["unexpected_keys"])


def _attach_bias(module: nn.Module, source: Source, unexpected: list[str], calls: list[AttentionCall]) -> int:
    """Gives keys the bias that the checkpoint may have for them; how many channels of the cache it takes."""
    heads, dim = calls[0].num_kv_heads, calls[0].head_dim
    biased = key_bias.attach(module, source, unexpected, layers=len(calls), kv_heads=heads, head_dim=dim)
    return key_bias.channels(dim) if biased else 0


def _stretched(source: Source, config: EngineConfig) -> Any:
    """The model's own configuration with its rotary embedding stretched; None where nobody asks for that."""
    if config.rope_scaling is None or config.max_model_len is None:
        return None
    found = AutoConfig.from_pretrained(
        source.path, gguf_file=source.gguf_file, trust_remote_code=config.trust_remote_code
    )
    stretch(found, config.rope_scaling, config.max_model_len)
    return found


def _load_tokenizer(source: Source, trust_remote_code: bool) -> Tokenizer:
    try:
        found = AutoTokenizer.from_pretrained(
            source.path, gguf_file=source.gguf_file, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"{source.name}: no tokenizer ({error})") from error
    return Tokenizer(found)


def _check_calls(calls: list[AttentionCall], text: Any) -> list[AttentionCall]:
    """The calls, if they are one per layer and alike in all that one paged cache must share."""
    if [call.layer for call in calls] != list(range(text.num_hidden_layers)):
        raise Unsupported(f"{text.model_type}: {len(calls)} attention calls for {text.num_hidden_layers} layers")
    for name in seam.ALIKE:
        if len(values := sorted({getattr(call, name) for call in calls})) > 1:
            raise Unsupported(f"{text.model_type}: layers differ in {name}: {', '.join(map(str, values))}")
    kinds = getattr(text, "layer_types", None) or [None] * len(calls)
    if unknown := {kind for kind in kinds if kind is not None} - LAYER_TYPES:
        raise Unsupported(f"{text.model_type}: layer type {', '.join(sorted(unknown))}")
    if any(
        kind is not None and (kind == "sliding_attention") != bool(call.window)
        for call, kind in zip(calls, kinds, strict=True)
    ):
        raise Unsupported(f"{text.model_type}: its sliding layers do not tell attention their window")
    return calls


def _max_model_len(asked: int | None, text: Any) -> int:
    limit: int | None = getattr(text, "max_position_embeddings", None)
    chosen = limit if asked is None else asked
    if chosen is None:
        raise InvalidRequest("max_model_len", "the model states no limit, so a number is needed, got none")
    if limit is not None and chosen > limit:
        raise InvalidRequest(
            "max_model_len",
            f"at most {limit}, the model's max_position_embeddings, unless rope_scaling stretches them, got {asked}",
        )
    return chosen


def _check_rotary(module: nn.Module, max_model_len: int) -> None:
    """Refuse rotary embeddings whose frequencies would change within `max_model_len` tokens.

    Such a change follows the longest position of the step, not of the sequence, so a token's key would depend on how
    its prompt was cut and on who shares the step. Below the change frequencies are constant and the model is served.
    """
    for rotary in module.modules():
        kinds = getattr(rotary, "rope_type", None)
        for layer_type, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            limit = _constant_until(rotary, layer_type, kind)
            if limit is not None and max_model_len > limit:
                raise Unsupported(
                    f"rope_type {kind}: changes its frequencies beyond {limit} tokens; max_model_len must be at most "
                    f"{limit}, got {max_model_len}"
                )


def _constant_until(rotary: Any, layer_type: str | None, kind: str | None) -> int | None:
    """How many tokens the frequencies stay constant for; None: for ever."""
    if kind == "longrope":
        parameters = rotary.config.rope_parameters
        chosen = parameters if layer_type is None else parameters[layer_type]
        return int(chosen["original_max_position_embeddings"])
    return int(rotary.max_seq_len_cached) if kind and "dynamic" in kind else None


def _swap(module: nn.Module, device: torch.device, quantization: str, *, layers: bool) -> None:
    """Give a CPU modules that are fast at decode, and weights in 8 bits where that is asked for.

    Without `layers` only linear layers change: a bias of the keys is added between projections and attention.
    """
    if device.type != "cpu":
        return
    if quantization == "int8":
        quantized.swap_linears(module)
        release_heap()  # the weights as they were, unless they lie in a file
    if (kernel := native_kernel()) is None:
        return
    swap_linears(module, kernel)
    if layers:
        from .cpu.decode_layer import swap_layers

        swap_layers(module)


def _eos_token_ids(module: Any) -> frozenset[int]:
    ids = module.generation_config.eos_token_id
    return frozenset([ids] if isinstance(ids, int) else ids or ())


def _fingerprint(module: Any) -> str:
    """A digest of the configuration and of up to 64 numbers of every parameter; big files stay unread.

    With several ranks it is of this rank's parts, whose shapes make it another one than that of the whole model.
    """
    digest = hashlib.sha256(module.config.to_json_string().encode())
    for name, parameter in module.named_parameters():
        part = own(parameter).detach()
        flat = part.flatten()
        spread = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
        digest.update(f"{name}{tuple(part.shape)}{part.dtype}{spread.tolist()}".encode())
    return digest.hexdigest()[:16]
