"""Configuration of the engine: one frozen model, validated once."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ByteSize, Field

from keysift.attention import DEFAULT, DenseKernel

from .checked import Checked
from .errors import InvalidRequest
from .support import check

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
RopeScaling = Literal["yarn", "linear"]
Backend = Literal["auto", "reference", "native", "triton"]


class EngineConfig(Checked):
    """Everything that an engine needs to run a model: for a server, an `LLM` or a benchmark.

    Raises `InvalidRequest` naming the field for an unknown name, a value out of bounds, or a combination that is not
    supported.
    """

    model: str | None = Field(
        None, description="folder of safetensors, GGUF file or hub name; none: the embedded smollm2-135m"
    )
    served_model_name: str | None = Field(
        None, description="model name in requests; none: taken from the folder, file or hub name"
    )
    strategy: str = Field(
        DEFAULT,
        description="attention strategy, or PROMPT+TOKEN: one for prompts, one for generated tokens; dense: exact",
    )
    strategy_args: tuple[str, ...] = Field((), description="option of a strategy, NAME.FIELD=VALUE; repeatable")
    max_model_len: int | None = Field(
        None, ge=1, description="most tokens of a prompt and its completion; none: the model's limit"
    )
    rope_scaling: RopeScaling | None = Field(
        None,
        description="yarn or linear: stretch the rotary embedding to a max_model_len beyond the model's limit; the "
        "quality of answers there is for you to check; none: such a length is refused",
    )
    page_size: int = Field(16, ge=1, le=256, description="tokens per page of the KV cache")
    code_bits: Literal[0, 2, 4] = Field(
        2, description="bits per channel of the compressed keys that are searched; 0: none, and pages a tenth smaller"
    )
    kv_memory: ByteSize | None = Field(
        None,
        description="memory for KV pages, such as 4GiB, and for what the index of strategy builds (ivf, graph); with "
        "kv_offload, for the pages that are being read; none: at most 40 % of what is free",
    )
    index_memory: ByteSize | None = Field(
        None,
        ge=0,
        description="most memory of what the indexes ivf and graph build, inside kv_memory if strategy names one of "
        "them, else beside it; beyond that the least recently used gives way, and pages without it are scanned; none: "
        "an eighth of what pages take",
    )
    kv_offload: str | None = Field(
        None,
        description="backing store of all KV pages, so that kv_memory holds only those that are being read: pinned "
        "(host memory) or, on a CPU, a folder (for an unnamed file in it); none: all pages are in kv_memory",
    )
    kv_offload_memory: ByteSize | None = Field(
        None, description="most bytes of the backing store; none: what requests can fill and the place has room for"
    )
    kv_prefetch: int = Field(
        0,
        ge=0,
        le=1024,
        description="most pages of each layer and KV head that are prefetched from the backing store for the next "
        "token; may pay on a slow disk",
    )
    dtype: Dtype = Field(
        "auto",
        description="precision of weights and KV pages; auto: bfloat16 where the hardware multiplies it, else float32",
    )
    quantization: Literal["none", "int8"] = Field(
        "none",
        description="int8: weights of linear layers in 8 bits, one scale for 64 of them, on a CPU; faster generation "
        "at short contexts, slower prompts, slightly different answers",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N; auto: cuda where there is one")
    device_map: Literal["none", "auto"] = Field(
        "none",
        description="auto: spread layers and their KV pages over all CUDA devices, for a model too large for one; they "
        "take turns (at once: tensor_parallel_size); not run on GPUs yet",
    )
    tensor_parallel_size: int = Field(
        1,
        ge=1,
        le=64,
        description="processes that share the model's heads, each with its own GPU or its part of the CPU's cores, and "
        "with kv_memory of its own",
    )
    backend: Backend = Field(
        "auto",
        description="implementation of the ops; auto: triton on CUDA, native on a CPU if it was built, else reference "
        "(torch)",
    )
    cuda_graphs: bool = Field(
        False,
        description="record decode steps as CUDA graphs and replay them, where all that a strategy does runs on the "
        "device; takes memory for each kind of step; not run on a GPU yet",
    )
    dense_kernel: DenseKernel = Field(
        "paged",
        description="kernel of prompt chunks that read their whole context: paged reads pages in place and is the "
        "fastest on a CPU; sdpa (torch's) and flash-attn (its package, on CUDA) copy them together first and are not "
        "measured on a GPU yet; generated tokens, sparse chunks, layers with a window and kv_offload always use paged",
    )
    max_num_seqs: int = Field(32, ge=1, description="most requests that run at once")
    max_queue: int = Field(256, ge=0, description="most requests that wait")
    patience: int = Field(
        256,
        ge=0,
        description="steps that a request waits before it goes ahead of all that came later, whatever their priority; "
        "until then requests that fit pass one that waits for pages",
    )
    prefill_chunk: int = Field(1024, ge=1, description="most prompt tokens of a step, a multiple of queries_per_row")
    queries_per_row: int = Field(64, ge=1, description="prompt tokens that share a selection, a multiple of page_size")
    prefix_cache: bool = Field(True, description="keep KV pages of prompts for later prompts that begin alike")
    reproducible: bool = Field(
        False,
        description="reuse cached prefixes in whole chunks only, and never pages of generated tokens, so that answers "
        "have the same bits with and without them; without it those after a reused dense prompt may differ by rounding",
    )
    checked: bool = Field(
        False,
        description="check every tensor and number that native kernels follow, and end a request rather than read "
        "foreign memory; slower",
    )
    trust_remote_code: bool = Field(False, description="run model code that comes with the weights")
    seed: int = Field(0, ge=0, description="seed of requests that sample without one of their own")

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        check(self)
        for name, unit in (("queries_per_row", "page_size"), ("prefill_chunk", "queries_per_row")):
            if getattr(self, name) % getattr(self, unit):
                raise InvalidRequest(name, f"a multiple of {unit} ({getattr(self, unit)}), got {getattr(self, name)}")
