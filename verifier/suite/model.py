"""What a suite file says: a baseline, experiments that change one thing each, and how all of it is run and compared."""

from __future__ import annotations

import msgspec

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.engines.base import ReplayMode
from fpforensics.common.prompts import DEFAULT_INSTRUCTION
from fpforensics.common.signals import CapturePlan

LOCAL = "local"


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One config of an experiment and how its worker is started.

    ``value`` is the variable's value as files show it. ``env`` and ``python`` are the worker's environment variables and
    interpreter.
    """

    config: ExecutionConfig
    name: str = ""
    value: str | int | bool = ""
    env: dict[str, str] = {}
    python: str = ""
    reload: bool = False
    nondeterministic: bool = False

    @property
    def arithmetic(self) -> str:
        """What decides the numbers: configs that differ in this alone in how they repeat are one to replay."""
        return msgspec.json.encode((self.config, sorted(self.env.items()), self.python)).decode()

    @property
    def identity(self) -> str:
        """What makes two variants one job: everything that decides what runs, by no name."""
        return msgspec.json.encode(
            (self.config, sorted(self.env.items()), self.python, self.reload, self.nondeterministic)
        ).decode()


class Experiment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One variable. ``baseline`` is the suite's own, or another that the experiment names.

    ``nondeterministic``: repetitions may differ. ``reload``: each repetition in a new worker. ``skip`` is why it does not run.
    """

    name: str
    variable: str
    baseline: Variant
    variants: tuple[Variant, ...] = ()
    skip: str = ""

    @property
    def file(self) -> str:
        """The name of its uniform JSON."""
        return f"{self.name}_experiment.json"


class References(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which prompts: ``documents`` are ``builtin`` or files."""

    count: int = 1
    prompt_tokens: int = 256
    new_tokens: int = 30
    documents: tuple[str, ...] = ("builtin",)
    instruction: str = DEFAULT_INSTRUCTION


class ProverSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where sessions run: ``endpoint`` is host:port or ``local``. ``labels`` say what it is, e.g. gpu=A100."""

    name: str = LOCAL
    endpoint: str = LOCAL
    device: str = "auto"
    labels: dict[str, str] = {}


class ReplaySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How this side replays what provers sent."""

    enabled: bool = True
    mode: ReplayMode = "decode"
    using: str = ""
    device: str = "auto"


class Comparison(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the analysis compares: the first ``top`` log-probabilities, by whose ids."""

    canonical: str = "claimed"
    top: int = 10


class Suite(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A whole suite file, checked."""

    name: str
    title: str
    baseline: Variant
    experiments: tuple[Experiment, ...]
    references: References = References()
    capture: CapturePlan = CapturePlan()
    layers_named: bool = False
    repetitions: int = 3
    provers: tuple[ProverSpec, ...] = (ProverSpec(),)
    replay: ReplaySettings = ReplaySettings()
    compare: Comparison = Comparison()
