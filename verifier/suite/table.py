"""One TOML table, read strictly: every complaint names file, table, key, value and the way out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fpforensics.common.errors import UsageError, did_you_mean, shorten


class Table:
    """A table of a file. What was not asked for by the time :meth:`close` is called is an unknown key."""

    def __init__(self, values: Mapping[str, Any], file: str, where: str = "") -> None:
        self._values = values
        self._known: set[str] = set()
        self.file = file
        self.where = where

    def has(self, key: str) -> bool:
        """Whether the key is given."""
        self._known.add(key)
        return key in self._values

    def text(self, key: str, default: str | None = None) -> str:
        """A string; one that has no default must be there and not be empty."""
        value = self._get(key, default)
        if not isinstance(value, str) or (default is None and not value.strip()):
            raise self.error(key, value, "a string")
        return value

    def number(self, key: str, default: int, low: int, high: int) -> int:
        """A whole number in bounds."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(key, value, f"a whole number from {low} to {high}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def choice(self, key: str, default: str, choices: tuple[str, ...]) -> str:
        """One of a closed list."""
        value = self.text(key, default)
        if value not in choices:
            raise self.error(key, value, did_you_mean(value, choices), hint=True)
        return value

    def texts(self, key: str, default: tuple[str, ...]) -> tuple[str, ...]:
        """A list of strings."""
        value = self._get(key, list(default))
        if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
            raise self.error(key, value, "a list of strings")
        return tuple(value)

    def mapping(self, key: str) -> dict[str, str]:
        """A table of strings; empty where it is missing."""
        value = self._get(key, {})
        if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
            raise self.error(key, value, 'a table of strings, e.g. { gpu = "A100" }')
        return value

    def scalar(self, key: str, default: str | int | bool) -> str | int | bool:
        """A string, whole number or boolean."""
        value = self._get(key, default)
        if not isinstance(value, str | int | bool):
            raise self.error(key, value, "a string, whole number or boolean")
        return value

    def table(self, key: str) -> Table:
        """A table; an empty one where it is missing."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self.error(key, value, f"a table [{self._path(key)}]")
        return Table(value, self.file, self._path(key))

    def tables(self, key: str) -> list[Table]:
        """An array of tables; none where it is missing."""
        value = self._get(key, [])
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise self.error(key, value, f"tables [[{self._path(key)}]]")
        return [Table(each, self.file, f"{self._path(key)}[{index}]") for index, each in enumerate(value)]

    def close(self) -> None:
        """Raise :class:`UsageError` for the first key that nobody asked for."""
        for key in self._values:
            if key not in self._known:
                raise UsageError(
                    f"{self._place()}: unknown key {shorten(key)!r} = {shorten(repr(self._values[key]))}",
                    did_you_mean(key, self._known),
                )

    def error(self, key: str, value: object, wanted: str, *, hint: bool = False) -> UsageError:
        """The complaint about a value; ``wanted`` says what it should be, or with ``hint`` what to do."""
        if key not in self._values:
            return UsageError(f"{self._place()}: {key} is missing", f"give {wanted}" if not hint else wanted)
        return UsageError(f"{self._place()}: {key} = {shorten(repr(value))}", wanted if hint else f"give {wanted}")

    def refused(self, key: str, value: object, error: UsageError) -> UsageError:
        """An error about a value, with the place where the value stands."""
        return UsageError(f"{self._place()}: {key} = {shorten(repr(value))}: {error.message}", error.hint)

    def _get(self, key: str, default: Any) -> Any:
        self._known.add(key)
        return self._values.get(key, default)

    def _path(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def _place(self) -> str:
        return f"suite {self.file}: [{self.where}]" if self.where else f"suite {self.file}"
