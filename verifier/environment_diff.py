"""The prover's recorded environment beside the verifier's: what differs, and whether that was to be expected.

Hardware is meant to differ. Software is not: another version may round differently, and then a distance is
not due to hardware alone. Which kernels ran follows from the hardware, and from variables that somebody set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import msgspec

from fpforensics.common.engines.base import EngineFacts
from fpforensics.common.environment import Environment

Kind = Literal["hardware", "software", "kernels"]
ABSENT = "absent"

Values = Mapping[str, str]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One compared thing, equal or not. ``expected`` says whether a difference here is no cause for doubt.

    ``prover`` is what signed evidence states: untrusted text, to be escaped where it is shown.
    """

    kind: Kind
    name: str
    prover: str
    verifier: str
    equal: bool
    expected: bool


def compare_environments(
    prover: Environment, prover_facts: EngineFacts, verifier: Environment, verifier_facts: EngineFacts
) -> tuple[Difference, ...]:
    """Hardware, software and what decided the kernels; what really ran comes before what was installed."""
    ours, theirs = _hardware(prover, prover_facts), _hardware(verifier, verifier_facts)
    hardware = tuple(_compare("hardware", ours, theirs, always_expected=True))
    other_machine = any(ours[name] != theirs[name] for name in ("device", "gpu", "cpu"))
    other_device = ours["device"] != theirs["device"]
    software = _compare(
        "software",
        _software(prover, prover_facts),
        _software(verifier, verifier_facts),
        builds_expected=other_device,
    )
    kernels = _compare("kernels", _kernels(prover_facts), _kernels(verifier_facts), always_expected=other_machine)
    variables = _compare("kernels", prover.variables, verifier.variables)
    return (*hardware, *software, *kernels, *variables)


def mismatches(differences: tuple[Difference, ...]) -> tuple[Difference, ...]:
    """Those that differ and should not."""
    return tuple(each for each in differences if not each.equal and not each.expected)


def _compare(
    kind: Kind,
    prover: Values,
    verifier: Values,
    *,
    always_expected: bool = False,
    builds_expected: bool = False,
) -> Iterator[Difference]:
    for name in dict.fromkeys((*prover, *verifier)):
        ours, theirs = prover.get(name) or ABSENT, verifier.get(name) or ABSENT
        yield Difference(
            kind=kind,
            name=name,
            prover=ours,
            verifier=theirs,
            equal=ours == theirs,
            expected=always_expected or (builds_expected and _same_release(ours, theirs)),
        )


def _same_release(prover: str, verifier: str) -> bool:
    """Whether only the build differs (2.13.0+cu128, 2.13.0+cpu), or one side has no use for the package."""
    return ABSENT in (prover, verifier) or prover.partition("+")[0] == verifier.partition("+")[0]


def _hardware(environment: Environment, facts: EngineFacts) -> dict[str, str]:
    return {
        "hostname": environment.hostname,
        "platform": environment.platform,
        "cpu": environment.cpu,
        "cpu_count": str(environment.cpu_count),
        "cpu_flags": " ".join(environment.cpu_flags),
        "device": facts.device,
        "gpu": facts.gpu or ", ".join(environment.gpus),
        "driver": environment.driver,
    }


def _software(environment: Environment, facts: EngineFacts) -> dict[str, str]:
    versions = {"python": environment.python} | environment.packages | facts.versions
    return dict(sorted(versions.items()))


def _kernels(facts: EngineFacts) -> dict[str, str]:
    observed = {f"attention ({phase})": ", ".join(names) for phase, names in facts.attention_kernels.items()}
    return observed | {"quantization": facts.quantization_kernel or "none"} | dict(sorted(facts.numerics.items()))
