"""Conversion between messages and the engine's types, by field names, which are the same on both sides."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from google.protobuf.message import Message

from keysift.engine.errors import InvalidRequest
from keysift.engine.request import (
    Finish,
    FinishReason,
    Logprob,
    Output,
    PrefillProgress,
    PromptInfo,
    Request,
    SamplingParams,
    Sparsity,
    Timings,
    TokenOutput,
    Usage,
)

from . import inference_pb2 as pb

GROUPS = ("sampling", "decoding", "stopping", "response")
"""Parts of a GenerateRequest whose fields are those of `SamplingParams` with the same names."""


def to_params(message: pb.GenerateRequest) -> SamplingParams:
    """Sampling parameters of a message, with defaults for unset fields; raises `InvalidRequest` naming the field."""
    fields: dict[str, Any] = {"temperature": message.temperature} if message.HasField("temperature") else {}
    for group in GROUPS:
        fields |= {field.name: _plain(value) for field, value in getattr(message, group).ListFields()}
    return SamplingParams(**fields)


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | float | str):
        return value
    return dict(value) if hasattr(value, "items") else tuple(value)


def to_request(message: pb.GenerateRequest, request_id: str, prompt: tuple[int, ...], **fields: Any) -> Request:
    """Request of a message; `fields` are those that the server sets or changes."""
    return Request(
        request_id=request_id,
        prompt=prompt,
        params=to_params(message),
        strategy=message.strategy or None,
        strategy_args=tuple(f"{name}={value}" for name, value in sorted(message.strategy_args.items())),
        bypass_prefix_cache=message.kv.bypass_prefix_cache,
        priority=message.priority,
        **fields,
    )


def from_params(params: SamplingParams) -> pb.GenerateRequest:
    """Message with the sampling parameters only."""
    message = pb.GenerateRequest(temperature=params.temperature)
    for group in GROUPS:
        part: Message = getattr(message, group)
        fill(part, **{name: getattr(params, name) for name in part.DESCRIPTOR.fields_by_name})
    return message


def fill(message: Message, **fields: Any) -> None:
    """Set fields of a message; raises `InvalidRequest` naming the first whose type or range does not fit."""
    for name, value in fields.items():
        try:
            message.MergeFrom(type(message)(**{name: value}))
        except (TypeError, ValueError, AttributeError) as error:
            raise InvalidRequest(name, f"does not fit the message: {error}") from None


def to_reply(output: Output) -> pb.GenerateReply:
    match output:
        case PromptInfo():
            return pb.GenerateReply(prompt_info=pb.PromptInfo(**asdict(output)))
        case PrefillProgress(_, total, cached, processed):
            progress = pb.PrefillProgress(total=total, cached=cached, processed=processed)
            return pb.GenerateReply(prefill_progress=progress)
        case TokenOutput(_, text, token_ids, logprobs):
            tokens = pb.TokenOutput(text=text, token_ids=token_ids, logprobs=map(_to_logprobs, logprobs))
            return pb.GenerateReply(output=tokens)
        case Finish():
            return pb.GenerateReply(finish=_to_finish(output))


def _to_logprobs(candidates: tuple[Logprob, ...]) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        candidates=[pb.Logprob(token_id=each.token_id, logprob=each.logprob, rank=each.rank) for each in candidates]
    )


def _to_finish(finish: Finish) -> pb.Finish:
    return pb.Finish(
        **_to_stop(finish.matched_stop),
        reason=pb.FinishReason.Value(finish.reason.name),
        usage=pb.Usage(**asdict(finish.usage)),
        timings=pb.Timings(**asdict(finish.timings)),
        sparsity=pb.Sparsity(**asdict(finish.sparsity)),
        error=finish.error,
        exhausted=finish.exhausted,
    )


def _to_stop(stop: str | int | None) -> dict[str, Any]:
    if stop is None:
        return {}
    return {"stop_string" if isinstance(stop, str) else "stop_token_id": stop}


def from_reply(reply: pb.GenerateReply, request_id: str) -> Output:
    """Engine output of a reply; only prompt_info has the request's id on the wire."""
    match reply.WhichOneof("event"):
        case "prompt_info":
            return PromptInfo(**_fields(reply.prompt_info))
        case "prefill_progress":
            return PrefillProgress(request_id, **_fields(reply.prefill_progress))
        case "output":
            output = reply.output
            logprobs = tuple(_from_logprobs(token) for token in output.logprobs)
            return TokenOutput(request_id, output.text, tuple(output.token_ids), logprobs)
        case "finish":
            return _from_finish(reply.finish, request_id)
        case event:
            raise ValueError(f"unknown event of a reply: {event}")


def _from_logprobs(token: pb.TokenLogprobs) -> tuple[Logprob, ...]:
    return tuple(Logprob(**_fields(candidate)) for candidate in token.candidates)


def _from_finish(finish: pb.Finish, request_id: str) -> Finish:
    stop = finish.WhichOneof("matched_stop")
    return Finish(
        request_id,
        FinishReason[pb.FinishReason.Name(finish.reason)],
        Usage(**_fields(finish.usage)),
        Timings(**_fields(finish.timings)),
        Sparsity(**_fields(finish.sparsity)),
        matched_stop=getattr(finish, stop) if stop else None,
        error=finish.error,
        exhausted=finish.exhausted,
    )


def _fields(message: Message) -> dict[str, Any]:
    """Scalar fields by name; None for an unset optional one."""
    fields = message.DESCRIPTOR.fields
    return {
        f.name: getattr(message, f.name) if not f.has_presence or message.HasField(f.name) else None for f in fields
    }
