"""`keysift calibrate`: prompt length from which each strategy is faster than dense attention."""

from __future__ import annotations

from typing import Annotated

import typer

from keysift.engine.config import EngineConfig
from keysift.engine.errors import InvalidRequest

from ..interrupts import importing
from .flags import Config, Json, from_fields, given

FIELDS = {
    "model",
    "page_size",
    "dtype",
    "device",
    "backend",
    "dense_kernel",
    "prefill_chunk",
    "queries_per_row",
    "max_model_len",
    "rope_scaling",
}
"""Fields of the engine that a calibration depends on, or that loading the model may need."""


@from_fields(engine=EngineConfig, skip=[f"engine.{name}" for name in set(EngineConfig.model_fields) - FIELDS])
def calibrate(
    context: typer.Context,
    engine: EngineConfig,
    forget: Annotated[bool, typer.Option("--forget", help="delete all stored calibrations, of every model")] = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Measure the prompt length from which each prompt strategy is faster than dense attention, and store it.

    Takes about a minute, on an otherwise idle machine. The stored lengths change which prompts are sparse: every engine
    with this machine, model and engine flags uses them as the strategy's dense_below, if the strategy's other options
    are as measured. To override one, pass --strategy-arg NAME.dense_below=N. To delete all, pass --forget. They are in
    calibration.json in $KEYSIFT_CACHE or the user's cache folder; keysift doctor prints them.

    [bold]Examples[/bold]

      keysift calibrate

      keysift calibrate ./my-model --dtype bfloat16 --max-model-len 16384

      keysift calibrate --forget
    """
    with importing():
        from .calibration import delete, run

    if forget:
        _refuse_fields(context)
        delete(as_json=json)
    else:
        run(engine, as_json=json)


def _refuse_fields(context: typer.Context) -> None:
    """Refuse ``keysift calibrate ./my-model --forget``, which would delete the calibrations of other models too."""
    if names := given(context, FIELDS):
        raise InvalidRequest("forget", f"deletes the calibrations of all models, got --forget and {', '.join(names)}")
