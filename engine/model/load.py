"""Loading of a causal language model of transformers, with its attention replaced by the engine's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from keysift.kvcache.native import checks

from .. import ranks
from ..config import EngineConfig
from ..devices import choose_device, choose_dtype
from ..errors import InvalidRequest, ModelNotFound, Unsupported
from ..support import Facts, check
from . import key_bias, placement, seam
from .checks import check_model, served_length
from .cpu.kernel_cache import bound_kernel_cache
from .cpu.swap import swap_modules
from .endings import eos_token_ids
from .fingerprint import fingerprint
from .loaded import LoadedModel
from .rope import stretched
from .source import Source, locate
from .tokenizer import Tokenizer

Report = Callable[[str], None]


def load(config: EngineConfig, report: Report) -> LoadedModel:
    """The model that `config` names, ready to run; `report` receives a line for each slow part.

    Raises `ModelNotFound`, `Unsupported` naming what cannot be served, or `InvalidRequest` naming the field.
    """
    if config.checked:
        checks.enable()
    bound_kernel_cache()
    device = ranks.local_device(choose_device(config.device), config.tensor_parallel_size)
    check(config, Facts(runs_on=device))
    source = locate(config.model, report)
    report(f"loading {source.name}")
    module, unexpected = _load_module(source, config, device)
    text = module.config.get_text_config(decoder=True)
    calls = seam.probe(module, device)
    max_model_len = served_length(config.max_model_len, text)
    check_model(config, module, calls, max_model_len, biased=key_bias.found(unexpected))
    heads, dim = calls[0].num_kv_heads, calls[0].head_dim
    bias_channels = key_bias.attach(module, source, unexpected, layers=len(calls), kv_heads=heads, head_dim=dim)
    if bias_channels and max_model_len > key_bias.TRAINED_LEN:
        report(f"{source.name} was trained on {key_bias.TRAINED_LEN} tokens, max_model_len is {max_model_len}")
    digest = fingerprint(module, config.quantization)  # of the modules as transformers names them
    if device.type == "cpu" and config.tensor_parallel_size == 1:  # split layers stay transformers' own
        swap_modules(module, config.quantization, layers=not bias_channels)  # a swapped layer knows no bias
    tokenizer = _load_tokenizer(source, config.trust_remote_code)
    return LoadedModel(
        name=config.served_model_name or source.name,
        module=module,
        tokenizer=tokenizer,
        max_model_len=max_model_len,
        vocab_size=text.vocab_size,
        dtype=module.dtype,
        device=device,
        eos_token_ids=eos_token_ids(source, module, tokenizer, text.vocab_size),
        **seam.facts(calls),
        fingerprint=digest,
        bias_channels=bias_channels,
        ranks=config.tensor_parallel_size,
    )


def _load_module(source: Source, config: EngineConfig, device: torch.device) -> tuple[Any, list[str]]:
    """The module of `source`, in evaluation mode, and names of tensors that it does not use. Safetensors or GGUF."""
    seam.register()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with _loading_errors(source), key_bias.hold_report() as held:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.path,
            config=stretched(source, config),
            gguf_file=source.gguf_file,
            dtype=choose_dtype(config.dtype, device),
            **placement.placed(config, device),
            attn_implementation=seam.NAME,
            use_safetensors=None if source.gguf_file else True,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
        )
    module, loading = loaded
    if module.config._attn_implementation != seam.NAME:
        raise Unsupported(f"{type(module).__name__}: its attention cannot be swapped")
    key_bias.release_report(held, loading)
    return module.eval().requires_grad_(False), list(loading["unexpected_keys"])


@contextmanager
def _loading_errors(source: Source) -> Iterator[None]:
    """Raise errors of transformers as `ModelNotFound` or `Unsupported` that name the model."""
    try:
        yield
    except OSError as error:
        raise ModelNotFound(f"{source.name}: {error}") from error
    except InvalidRequest:
        raise
    except (ValueError, KeyError) as error:
        raise Unsupported(f"{source.name}: {str(error).splitlines()[0]}") from error


def _load_tokenizer(source: Source, trust_remote_code: bool) -> Tokenizer:
    try:
        found = AutoTokenizer.from_pretrained(
            source.path, gguf_file=source.gguf_file, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"{source.name}: no tokenizer ({error})") from error
    return Tokenizer(found)
