"""End tokens of a model, which its files state in up to three places."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from .source import Source
from .tokenizer import Tokenizer


def eos_token_ids(source: Source, module: Any, tokenizer: Tokenizer, vocab_size: int) -> frozenset[int]:
    """Tokens that end a text: those of the settings of generation, of the configuration and of the tokenizer together.

    Instruct models end a turn with the tokenizer's, and their other files may name the base model's alone.
    """
    stated = [module.generation_config.eos_token_id, tokenizer.eos_token_id, *_of_config(source)]
    ids = [number for each in stated for number in ([each] if isinstance(each, int) else each or ())]
    return frozenset(number for number in ids if 0 <= number < vocab_size)


def _of_config(source: Source) -> list[Any]:
    """End tokens that a folder's config.json states: the default of a configuration's class says nothing."""
    if source.gguf_file:
        return []
    stated, _ = PreTrainedConfig.get_config_dict(source.path)
    return [part.get("eos_token_id") for part in (stated, stated.get("text_config") or {})]
