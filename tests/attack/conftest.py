"""The server of `tests.server`, on a thread of this process, and the tiny model of `tests.engine`."""

from tests.engine.conftest import tiny_llama, write_model
from tests.server.conftest import engine_config, loop, model_folder, running, start

__all__ = ["engine_config", "loop", "model_folder", "running", "start", "tiny_llama", "write_model"]
