"""The engine's configuration: one frozen model, validated once."""

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
    """What a server, an `LLM` or a benchmark needs to know to run a model.

    Raises `InvalidRequest` naming the field for a value out of bounds or a name it does not know.
    """

    model: str | None = Field(
        None, description="folder of safetensors, GGUF file or hub name; none: the embedded smollm2-135m"
    )
    served_model_name: str | None = Field(None, description="name that requests use; none: the model's own")
    strategy: str = Field(DEFAULT, description="attention strategy, or PROMPT+TOKEN for one each; dense: exact")
    strategy_args: tuple[str, ...] = Field((), description="NAME.FIELD=VALUE, repeatable")
    max_model_len: int | None = Field(
        None, ge=1, description="longest prompt + completion in tokens; none: the model's own"
    )
    rope_scaling: RopeScaling | None = Field(
        None,
        description="yarn or linear: stretches the rotary embedding where max_model_len is beyond what the model was "
        "made for; how good answers are there is yours to check; none: such a length is refused",
    )
    page_size: int = Field(16, ge=1, le=256, description="tokens of a page")
    code_bits: Literal[0, 2, 4] = Field(
        2, description="bits of a channel in the codes that keys are searched by; 0: none, and pages a tenth smaller"
    )
    kv_memory: ByteSize | None = Field(
        None,
        description="bytes for KV pages, such as 4GiB, with kv_offload for those at hand; none: at most 40 % of what "
        "is free",
    )
    kv_offload: str | None = Field(
        None,
        description="where KV pages live when kv_memory holds only those that are being read: a folder on a CPU, for a "
        "nameless file in it, or pinned for host memory beside a GPU; none: all pages are in kv_memory",
    )
    kv_offload_memory: ByteSize | None = Field(
        None, description="most bytes of the KV home; none: what the requests can fill and the place has room for"
    )
    kv_prefetch: int = Field(
        0,
        ge=0,
        le=1024,
        description="pages of each layer and KV head that a token may fetch from the KV home on a guess at what the "
        "next one reads; may pay where reading waits for a slow disk",
    )
    dtype: Dtype = Field("auto", description="of weights and pages; auto: bfloat16 where the hardware multiplies it")
    quantization: Literal["none", "int8"] = Field(
        "none",
        description="int8: weights of the linear layers in 8 bits, one scale for 64 of them, on a CPU; generated "
        "tokens come faster where they wait for weights, so behind short contexts; prompts take longer; answers differ "
        "a little",
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1")
    device_map: Literal["none", "auto"] = Field(
        "none",
        description="auto: a model that is too large for one GPU, its layers and their KV pages spread over all CUDA "
        "devices, which take turns; tensor_parallel_size has them work at once; not run on GPUs yet",
    )
    tensor_parallel_size: int = Field(
        1,
        ge=1,
        le=64,
        description="processes that share the model's heads, each with a GPU of its own or some of the CPU's cores; "
        "kv_memory is that of each",
    )
    backend: Backend = Field(
        "auto",
        description="twin of the ops; auto: triton on CUDA, native on CPU where it was built, else the torch reference",
    )
    cuda_graphs: bool = Field(
        False,
        description="record the kernels of a decode step once and start them together from then on, on a CUDA device, "
        "where the host has no say in what a token reads; takes memory for each kind of step; not run on a GPU yet",
    )
    dense_kernel: DenseKernel = Field(
        "paged",
        description="what computes where a chunk of a prompt reads everything: paged reads pages where they are and is "
        "faster than sdpa on a CPU; sdpa (torch's) and flash-attn (its package, on CUDA) copy them together first "
        "and are not measured on a GPU yet; tokens, sparse chunks, layers with a window and kv_offload stay with paged",
    )
    max_num_seqs: int = Field(32, ge=1, description="requests that run at once")
    max_queue: int = Field(256, ge=0, description="requests that may wait")
    prefill_chunk: int = Field(1024, ge=1, description="prompt tokens of one step, a multiple of queries_per_row")
    queries_per_row: int = Field(64, ge=1, description="prompt tokens that share a selection, a multiple of page_size")
    prefix_cache: bool = Field(True, description="keep pages of finished prompts for prompts that begin alike")
    trust_remote_code: bool = Field(False, description="run model code that comes with the weights")
    seed: int = Field(0, ge=0, description="of requests that sample without a seed of their own")

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        check(self)
        for name, unit in (("queries_per_row", "page_size"), ("prefill_chunk", "queries_per_row")):
            if getattr(self, name) % getattr(self, unit):
                raise InvalidRequest(name, f"a multiple of {unit} ({getattr(self, unit)}), got {getattr(self, name)}")
