"""Backends by name. Each is imported when it is asked for and not before: ``--help`` never imports torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.engines.base import Engine, Host
from fpforensics.common.errors import UsageError, did_you_mean, shorten

ENGINES: Mapping[str, str] = {
    "transformers": "fpforensics.common.engines.transformers_engine:TransformersEngine",
    "vllm": "fpforensics.common.engines.vllm_engine:VllmEngine",
}


def open_engine(config: ExecutionConfig, host: Host | None = None) -> Engine:
    """Load ``config`` in this process. Prefer :func:`fpforensics.common.engines.remote.start_engine`.

    Raises :class:`UsageError` for an unknown backend, :class:`MissingDependencyError` with the install
    command, and :class:`ReplayError` if the model cannot be run as asked.
    """
    module, _, name = find_engine(config).partition(":")
    engine: Engine = getattr(importlib.import_module(module), name)(config, host or Host())
    return engine


def find_engine(config: ExecutionConfig) -> str:
    """The ``module:class`` that runs the config's backend. Raises :class:`UsageError` where there is none."""
    entry = ENGINES.get(config.backend)
    if entry is None:
        raise UsageError(
            f"no engine for backend {shorten(config.backend)!r} here", did_you_mean(config.backend, ENGINES)
        )
    return entry


@contextmanager
def in_process(config: ExecutionConfig, host: Host, cancelled: Callable[[], bool]) -> Iterator[Engine]:
    """An :class:`~fpforensics.common.engines.base.EngineStarter` without a worker, for notebooks and tests.

    ``host.python``, ``host.env`` and ``cancelled`` have no effect.
    """
    engine = open_engine(config, host)
    try:
        yield engine
    finally:
        engine.close()
