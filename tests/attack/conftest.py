"""The server of `tests.server`, on a thread of this process."""

from tests.server.conftest import engine_config, loop, model_folder, running, start

__all__ = ["engine_config", "loop", "model_folder", "running", "start"]
