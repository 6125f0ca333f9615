"""Attacks on the verifier: each makes what a liar would sign out of honest material. ``docs/attacks.md`` has the results."""

from __future__ import annotations

from attacks.attack import Attack
from attacks.choices import CHOICES
from attacks.numbers import NUMBERS

ATTACKS: tuple[Attack, ...] = (*NUMBERS, *CHOICES)
