"""The prover's recorded environment beside the verifier's: what differs, and whether that was to be expected.

Hardware is meant to differ. Software is not: another version may round differently, and then a distance is
not due to hardware alone. Which kernels ran follows from the hardware, from variables that somebody set, and from
what is under test: a lie about quantization is no accident of software. How many threads compute follows from the machine,
whoever says it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Literal

import msgspec

from fpforensics.common.config import Claim, ExecutionConfig
from fpforensics.common.engines.base import EngineFacts, ReplayMode
from fpforensics.common.environment import KERNEL_VARIABLES, Environment

Kind = Literal["hardware", "software", "kernels"]
ABSENT = "absent"
NOT_RUN = "not run in a prefill replay"

Values = Mapping[str, str]
_Expected = Callable[[str, str, str], bool]  # (name, prover's value, verifier's value)
_THREADS = frozenset({"threads", "OMP_NUM_THREADS", "MKL_NUM_THREADS"})
_DECODE, _PRODUCTS, _STEPS = "attention (decode)", "matmul_operators", "batch_schedule"
# What a field of the config decides, beside what it says itself.
_DECIDED_BY: Mapping[str, tuple[str, ...]] = {
    "quantization": ("quantization", _PRODUCTS),
    "attention": ("attention (prefill)", _DECODE, _PRODUCTS),
    "dtype": (_PRODUCTS,),
    "batch_size": (_PRODUCTS, _STEPS),
    "max_batched_tokens": ("max_batched_tokens", _STEPS),
    "kv_cache": ("kv_cache_dtype", "attention (prefill)", _DECODE),
    "cuda_graphs": ("cuda_graphs", "graph_sizes"),
    "tensor_parallel": (_PRODUCTS,),
    "matmul": ("matmul", _PRODUCTS),
    "compile": ("compile", _PRODUCTS),
    "emulate_tensor_parallel": ("emulated_tensor_parallel", _PRODUCTS),
    "model": ("experts", _PRODUCTS),
}


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One compared thing, equal or not. ``expected`` says whether a difference here is no cause for doubt, and ``tested``
    that it is none because the claim or the lineup is about it.

    ``prover`` is what signed evidence states: untrusted text, to be escaped where it is shown.
    """

    kind: Kind
    name: str
    prover: str
    verifier: str
    equal: bool
    expected: bool
    tested: bool = False


def fields_under_test(claim: Claim | None, lineup: Sequence[ExecutionConfig]) -> frozenset[str]:
    """The fields of a config that ``claim`` asserts (None: each row's own declaration) or in which the lineup differs."""
    fields = set(claim.assertions if claim else ())
    for name in ExecutionConfig.__struct_fields__:
        if len({getattr(config, name) for config in lineup}) > 1:
            fields.add(name)
    return frozenset(fields)


def compare_environments(
    prover: Environment,
    prover_facts: EngineFacts,
    verifier: Environment,
    verifier_facts: EngineFacts,
    *,
    mode: ReplayMode = "decode",
    tested: Collection[str] = (),
) -> tuple[Difference, ...]:
    """Hardware, software and what decided the kernels, each once; what really ran comes before what was installed.

    ``tested`` are the fields of a config that the claim or the lineup is about (:func:`fields_under_test`).
    """
    ours, theirs = _hardware(prover, prover_facts), _hardware(verifier, verifier_facts)
    hardware = tuple(_compare("hardware", ours, theirs, lambda *_: True))
    other_machine = any(ours[name] != theirs[name] for name in ("device", "gpu", "cpu"))
    other_threads = other_machine or ours["cpu_count"] != theirs["cpu_count"]
    other_device = ours["device"] != theirs["device"]
    software = _compare(
        "software",
        _software(prover, prover_facts),
        _software(verifier, verifier_facts),
        lambda _, ours, theirs: other_device and _same_release(ours, theirs),
    )
    # Engines state some variables too, among what decides rounding: each is compared once, as a variable.
    variables = {*prover.variables, *verifier.variables} & set(KERNEL_VARIABLES)
    ran, replayed = (
        {k: v for k, v in _kernels(each).items() if k not in variables} for each in (prover_facts, verifier_facts)
    )
    partial = mode == "prefill"
    if partial and "decode" not in verifier_facts.attention_kernels:
        replayed |= {name: NOT_RUN for name in (_DECODE, _STEPS) if name in ran and name not in replayed}
    decided = {name for field in tested for name in _DECIDED_BY.get(field, ())}
    kernels = _compare(
        "kernels",
        ran,
        replayed,
        lambda name, ours, theirs: (
            other_machine
            or (other_threads and name in _THREADS)
            or (partial and _only_decode_differs(name, ours, theirs))
        ),
        decided,
    )
    set_here = _compare(
        "kernels", prover.variables, verifier.variables, lambda name, *_: other_threads and name in _THREADS
    )
    return (*hardware, *software, *kernels, *set_here)


def mismatches(differences: tuple[Difference, ...]) -> tuple[Difference, ...]:
    """Those that differ and should not."""
    return tuple(each for each in differences if not each.equal and not each.expected)


def _compare(
    kind: Kind,
    prover: Values,
    verifier: Values,
    expected: _Expected = lambda *_: False,
    tested: Collection[str] = (),
) -> Iterator[Difference]:
    for name in dict.fromkeys((*prover, *verifier)):
        ours, theirs = prover.get(name) or ABSENT, verifier.get(name) or ABSENT
        known = expected(name, ours, theirs)
        yield Difference(
            kind=kind,
            name=name,
            prover=ours,
            verifier=theirs,
            equal=ours == theirs,
            expected=known or name in tested,
            tested=name in tested and not known,
        )


def _only_decode_differs(name: str, prover: str, verifier: str) -> bool:
    """Whether a replay by one forward over everything explains it: no decode kernel ran, so none of its operators did."""
    return (name in (_DECODE, _STEPS) and verifier == NOT_RUN) or (
        name == _PRODUCTS and set(verifier.split(", ")) < set(prover.split(", "))
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
