"""How the parts of a run that work side by side are ended together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class Stop:
    """Asked by whatever works (it is true once all is to end); waits end early, and connections that block are closed."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._closers: list[Callable[[], None]] = []

    def __call__(self) -> bool:
        """Whether everything is to end."""
        return self._event.is_set()

    def set(self) -> None:
        """Everything is to end now."""
        with self._lock:
            self._event.set()
            closers = list(self._closers)
        for close in closers:
            with suppress(Exception):  # one that fails leaves no other open
                close()

    def wait(self, seconds: float) -> None:
        """Wait so long, or until everything is to end."""
        self._event.wait(seconds)

    @contextmanager
    def closing(self, close: Callable[[], None]) -> Iterator[None]:
        """Within this, ``close`` is called when everything is to end, by the thread that says so."""
        with self._lock:
            self._closers.append(close)
        try:
            if self():
                close()
            yield
        finally:
            with self._lock:
                self._closers.remove(close)
