"""What every page is made with: templates that escape all they show, and the cells of heat maps."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np

from fpforensics.common.errors import MissingDependencyError
from fpforensics.common.words import counted
from fpforensics.verifier.matrix import Table
from fpforensics.verifier.report import SIGNAL_TITLES, clean, decided, distance, fixed, floors, log_scale, snr

if TYPE_CHECKING:
    import jinja2


@dataclass(frozen=True)
class Heat:
    """One cell of a heat map: its text, its colour (0 to 1, or None), whether it is the diagonal."""

    shown: str
    heat: float | None
    own: bool

    @property
    def style(self) -> str:
        """Numbers of ours only: this is the one value that reaches a style attribute."""
        return "" if self.heat is None else f"--t:{100 * self.heat:.0f}%"

    @property
    def classes(self) -> str:
        """``hot`` cells take the light ink; ``own`` ones an outline."""
        return " ".join(["hot"] * (self.heat is not None and self.heat > 0.5) + ["own"] * self.own)


def render_page(template: str, **values: object) -> str:
    """One self-contained page. Raises :class:`MissingDependencyError` where jinja2 is not installed."""
    return _environment().get_template(template).render(values)


def heat_rows(
    rows: Sequence[str], columns: Sequence[str], values: Table, is_own: Callable[[str, str], bool]
) -> list[tuple[str, list[Heat]]]:
    """The claimed config and the coloured cells of each row, on the log scale of this table."""
    scaled = log_scale(np.array(values, dtype=np.float64))  # None becomes NaN
    return [
        (
            name,
            [
                Heat(distance(value), None if value is None else float(heat), is_own(name, column))
                for column, value, heat in zip(columns, line, heats, strict=True)
            ],
        )
        for name, line, heats in zip(rows, values, scaled, strict=True)
    ]


def _environment() -> jinja2.Environment:
    try:
        import jinja2
        import markupsafe
    except ImportError:
        raise MissingDependencyError("the HTML page", "jinja2", "pip install '.[report]'") from None

    def finalize(value: object) -> object:
        return clean(value) if isinstance(value, str) and not isinstance(value, markupsafe.Markup) else value

    def breakable(name: str, after: str = ",") -> markupsafe.Markup:
        """A long config id that may be broken after each of these characters."""
        return markupsafe.Markup("<wbr>").join(re.split(f"(?<=[{re.escape(after)}])", clean(name)))

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: resources.files(__package__).joinpath(name).read_text("utf-8")),
        autoescape=True,
        finalize=finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "distance": distance,
        "fixed": fixed,
        "floors": floors,
        "breakable": breakable,
        "counted": counted,
    }
    environment.globals |= {"titles": SIGNAL_TITLES, "snr": snr, "decided": decided}
    return environment
