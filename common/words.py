"""Small words in what people read."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """``1 prompt``, ``2 prompts``."""
    return f"{number} {noun}{'s' * (number != 1)}"
