"""The tables of docs/vllm-evidence.md, from the recorded evidence in ``tests/assets/hopper``; needs no model.

    bench/vllm_tables.py

Distances are L2, the mean over positions, then over references. *Same machine*: one config's numbers against another's about the same tokens, on
one H200. *CPU*: what that GPU signed against replays by transformers on a CPU (``bench/vllm_cpu.py``). The SNR is the published rule's: the mean
distance between two configs, both ways, over the mean of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FOLDER = Path(__file__).parents[1] / "tests" / "assets" / "hopper"
KINDS = ("attention", "serving", "quantization", "formats", "tensor-parallel", "moe")
SHORT = {
    "model=base,attn=vllm_flash_attn_3": "FA3",
    "model=base,attn=vllm_flash_attn_2": "FA2",
    "model=base,attn=vllm_triton": "Triton",
    "model=base,compile=true,graphs=true": "compile + graphs",
    "model=base,batch=2": "batch 2",
    "model=base,batch=4": "batch 4",
    "model=base,batch=8": "batch 8",
    "model=base,kv=fp8": "KV fp8",
    "model=base,dtype=fp16": "fp16",
    "model=base,attn=vllm_flex": "flex",
    "model=base,compile=true": "compile",
    "model=awq,quant=awq_marlin": "awq_marlin",
    "model=gptq,quant=gptq_marlin": "gptq_marlin",
    "model=base,quant=bnb-nf4": "bnb-nf4",
    "model=awq,dtype=fp16,quant=awq": "awq, fp16",
    "model=awq,dtype=fp16,quant=awq_marlin": "awq_marlin, fp16",
    "model=gptq,dtype=fp16,quant=gptq": "gptq, fp16",
    "model=gptq,dtype=fp16,quant=gptq_marlin": "gptq_marlin, fp16",
    "model=f8,quant=compressed-fp8": "compressed fp8",
    "model=i8,quant=compressed-int8": "compressed int8",
    "model=w4,quant=compressed-int4": "compressed int4",
    "model=base,attn=vllm_flash_attn_3,tp=2": "TP 2",
    "model=moe": "MoE, TP 1",
    "model=moe,tp=2": "MoE, TP 2",
    "model=moe,tp=2,ep=2": "MoE, TP 2, EP 2",
}
SIGNALS = {
    "hidden states after block 1": "hidden_states-1",
    "hidden states after the last block": "hidden_states-last",
    "log-probabilities": "logprobs-all",
}
FINGERPRINTS = ("decode_fingerprint", "prefill_fingerprint")
EARLY = ("hidden_states-1", "hidden_states-2", "key_vectors-2", "key_vectors-4")
LINEAGE = {"fa3": "base", "tp2": "base, emulate_tp=2", "awq_marlin": "awq", "gptq_marlin": "gptq", "bnb-nf4": "nf4"}
"""Which member a bundle's config is to transformers."""


@dataclass(frozen=True)
class Matrices:
    """One file of ``bench/vllm_matrix.py``, without the configs that did not run."""

    kind: str
    names: tuple[str, ...]
    reports: Mapping[str, Any]
    classes: Mapping[str, list[list[str]]]
    _values: Mapping[str, Floats]

    def cell(self, mode: str, cell: str) -> Floats:
        """Rows: the config in decode mode; columns: the config in ``mode``. Of the same tokens."""
        return self._values[f"shared/{mode}/{cell}"]

    def between(self, cell: str, a: str, b: str, mode: str = "decode") -> float:
        """The mean of both directions."""
        at = [[*map(SHORT.get, self.names)].index(each) for each in (a, b)]
        matrix = self.cell(mode, cell)
        return float((matrix[at[0], at[1]] + matrix[at[1], at[0]]) / 2)

    def snr(self, cell: str, a: str, b: str) -> float:
        """The published rule with the same config's decode against its own prefill as the noise."""
        at = [[*map(SHORT.get, self.names)].index(each) for each in (a, b)]
        return self.between(cell, a, b, "prefill") / float(np.mean(self.cell("prefill", cell)[at, at]))


@cache
def load(kind: str) -> Matrices:
    """``kind`` is one of :data:`KINDS`."""
    summary = json.loads((FOLDER / f"{kind}.json").read_text())
    with np.load(FOLDER / f"{kind}.npz") as file:
        names = [str(name) for name in file["names"]]
        ran = [index for index, name in enumerate(names) if "facts" in summary["configs"][name]]
        values = {key: file[key][np.ix_(ran, ran)] for key in file.files if key != "names"}
    return Matrices(kind, tuple(names[index] for index in ran), summary["configs"], summary["classes"], values)


@dataclass(frozen=True)
class OnCpu:
    """``cpu.npz``; ``distances`` (bundles, members, references, cells, positions)."""

    distances: Floats
    bundles: tuple[str, ...]
    members: tuple[str, ...]
    cells: tuple[str, ...]
    prompt_positions: int

    def mean(self, bundle: str, member: str, cell: str) -> float:
        """Over all positions and references."""
        return float(self.at(bundle, member, cell).mean())

    def at(self, bundle: str, member: str, cell: str) -> Floats:
        """(references, positions), the prompt's positions first."""
        i, j, k = self.bundles.index(bundle), self.members.index(member), self.cells.index(cell.replace("-", "/"))
        found: Floats = self.distances[i, j, :, k]
        return found

    def snr(self, cell: str, a: str, b: str) -> float:
        """The published rule: a and b are bundles, replayed by what transformers has for each."""
        signal = self.mean(a, LINEAGE[b], cell) + self.mean(b, LINEAGE[a], cell)
        return signal / (self.mean(a, LINEAGE[a], cell) + self.mean(b, LINEAGE[b], cell))

    def nearest(self, bundle: str, right: str, wrong: str, cell: str) -> float:
        """The share of single positions that lie nearer to the right member's replay."""
        return float((self.at(bundle, right, cell) < self.at(bundle, wrong, cell)).mean())


@cache
def load_cpu() -> OnCpu:
    with np.load(FOLDER / "cpu.npz") as file:
        names = {key: tuple(map(str, file[key])) for key in ("bundles", "members", "cells")}
        return OnCpu(file["distances"].astype(np.float64), **names, prompt_positions=int(file["prompt_positions"]))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Markdown."""
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(row) + " |")
    print()


def digits(value: float) -> str:
    """Three digits that count."""
    if value == 0:
        return "0"
    return f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:.0f}"


@cache
def load_h100() -> Mapping[str, Mapping[str, Any]]:
    """What an H100 gave: ``configs``, reports as in :attr:`Matrices.reports`, and ``bundles``, fingerprints of their traces."""
    found: Mapping[str, Mapping[str, Any]] = json.loads((FOLDER / "h100.json").read_text())
    return found


def on_h100(ours: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> str:
    """Whether an H100 gave the bits of the H200, of the same tokens in both modes."""
    if theirs is None:
        return "not run"
    alike = [theirs[mode] == ours[mode] for mode in FINGERPRINTS]
    return "yes" if all(alike) else "in prefill mode" if alike == [False, True] else "**no**"


def print_resolved() -> None:
    h100 = load_h100()["configs"]
    rows: dict[str, list[str]] = {}
    for kind in KINDS:
        found = load(kind)
        for name in found.names:
            report = found.reports[name]
            facts = report["facts"]
            kernels = facts["quantization_kernel"] or facts["numerics"]["matmul_operators"]
            experts = facts["numerics"].get("experts")
            same = report["bit_identical"], report["decode_replay_identical"]
            rows.setdefault(
                f"`{name}`",
                [
                    ", ".join(facts["attention_kernels"]["decode"]),
                    kernels + (f"; {experts}" if experts else ""),
                    facts["numerics"]["cuda_graphs"],
                    *("yes" if each else "**no**" for each in same),
                    on_h100(report, h100.get(name)),
                ],
            )
    head = ["config", "attention", "linear layers", "CUDA graphs", "repetitions equal", "decode replay equal"]
    head.append("same bits on an H100")
    table(head, [[name, *row] for name, row in rows.items()])


def print_matrices(kind: str) -> None:
    found = load(kind)
    names = [SHORT[name] for name in found.names]
    for title, signal in SIGNALS.items():
        above, below = found.cell("decode", f"prefill-{signal}"), found.cell("decode", f"decode-{signal}")
        print(f"{title}:\n")
        rows = [
            [name, *("·" if i == j else digits((above if j > i else below)[i, j]) for j in range(len(names)))]
            for i, name in enumerate(names)
        ]
        table(["", *names], rows)


def print_floors(kind: str) -> None:
    found = load(kind)
    rows = []
    for name in found.names:
        short, index = SHORT[name], found.names.index(name)
        own = [found.cell("prefill", f"decode-{signal}")[index, index] for signal in SIGNALS.values()]
        rows.append([short, *map(digits, own)])
    table(["decode against prefill", *SIGNALS], rows)


@dataclass(frozen=True)
class Compared:
    """A row of the published table beside ours. ``bundles``: the two in ``cpu.npz``, where transformers has a replay for each."""

    what: str
    published: str
    kind: str
    a: str
    b: str
    bundles: tuple[str, str] | None = None


NOT_THERE = "not published"
KERNELS = "sdpa, FA2: 1.0, 1.0 (keys 0.82, 1.05); with eager: 10.3, 5.8 (keys 10.9, 4.4)"
COMPARED = (
    Compared(
        "AWQ or GPTQ, both Marlin",
        "85.2, 81.1 (awq and gptq_marlin: 91.7, 76.1)",
        "quantization",
        "awq_marlin",
        "gptq_marlin",
        ("awq_marlin", "gptq_marlin"),
    ),
    Compared("AWQ or GPTQ, both plain", NOT_THERE, "quantization", "awq, fp16", "gptq, fp16"),
    Compared("awq or awq_marlin", "1.0, 1.0", "quantization", "awq, fp16", "awq_marlin, fp16"),
    Compared("gptq or gptq_marlin", NOT_THERE, "formats", "gptq, fp16", "gptq_marlin, fp16"),
    Compared(
        "compressed int4 (Machete) or gptq_marlin, the same weights",
        NOT_THERE,
        "formats",
        "compressed int4",
        "gptq_marlin",
    ),
    Compared("compressed fp8 or none", NOT_THERE, "formats", "compressed fp8", "FA3"),
    Compared("compressed int8 or none", NOT_THERE, "formats", "compressed int8", "FA3"),
    Compared("KV cache in fp8 or bf16", NOT_THERE, "serving", "KV fp8", "FA3"),
    Compared("fp16 or bf16", NOT_THERE, "serving", "fp16", "FA3"),
    Compared("bnb-nf4 or none", NOT_THERE, "quantization", "bnb-nf4", "FA3", ("bnb-nf4", "fa3")),
    Compared("FA2 or FA3", KERNELS, "attention", "FA2", "FA3"),
    Compared("FA2 or Triton", "as above", "attention", "FA2", "Triton"),
    Compared("FA3 or Triton", "as above", "attention", "FA3", "Triton"),
    Compared("flex or FA3", "as above", "serving", "flex", "FA3"),
    Compared("TP 1 or 2", "TP 1, 2, 4: 0.90, not measured", "tensor-parallel", "FA3", "TP 2", ("fa3", "tp2")),
    Compared("EP 1 or 2, both TP 2 (tiny MoE)", NOT_THERE, "moe", "MoE, TP 2", "MoE, TP 2, EP 2"),
    Compared("TP 1 or 2 (tiny MoE)", NOT_THERE, "moe", "MoE, TP 1", "MoE, TP 2"),
    Compared("batch 1 or 2", "0 to 1.32, not measured (last hidden state)", "attention", "FA3", "batch 2"),
    Compared("batch 1 or 4", "as above", "serving", "FA3", "batch 4"),
    Compared("batch 4 or 8", "as above", "serving", "batch 4", "batch 8"),
    Compared("compile or neither", NOT_THERE, "serving", "FA3", "compile"),
    Compared("compile with CUDA graphs or neither", NOT_THERE, "attention", "FA3", "compile + graphs"),
)
"""Published SNR of log-probabilities, prompt positions then generated ones. AWQ and GPTQ: Qwen3-8B, vLLM 0.11.2, float16, A100 against H100, 4 prompts.
Attention: H100 against A100, transformers 4.57.3, 6 prompts. TP: Qwen3-14B, vLLM 0.11.2, A100 against H100, 3 prompts. Batch:
Qwen2.5-7B-Instruct, four GPUs, what ``verifier analyze`` prints of their numbers: within each, over the mean between them."""


def print_published() -> None:
    rows = []
    for row in COMPARED:
        found = load(row.kind)
        ours = [digits(found.snr(f"decode-{signal}", row.a, row.b)) for signal in SIGNALS.values()]
        last, block = ("logprobs", "hidden_states-1")
        across = [digits(load_cpu().snr(cell, *row.bundles)) if row.bundles else "—" for cell in (last, block)]
        rows.append([row.what, row.published, ours[2], ours[1], ours[0], *across])
    table(
        [
            "pair",
            "published, log-probabilities",
            "same machine: log-probabilities",
            "last block",
            "block 1",
            "H200 to CPU: log-probabilities",
            "block 1",
        ],
        rows,
    )


def print_cpu() -> None:
    found = load_cpu()
    for title, cell in (("hidden states after block 1", "hidden_states-1"), ("log-probabilities", "logprobs")):
        print(f"{title}:\n")
        rows = [[name, *(digits(found.mean(name, member, cell)) for member in found.members)] for name in found.bundles]
        table(["evidence", *found.members], rows)


def print_partial_sums() -> None:
    found = load_cpu()
    one, two = "base", "base, emulate_tp=2"
    rows = []
    for cell in (*EARLY, "hidden_states-4", "logprobs"):
        rows.append(
            [
                cell.replace("-", ", block "),
                *(digits(found.mean(name, member, cell)) for name in ("fa3", "tp2") for member in (one, two)),
                f"{found.nearest('fa3', one, two, cell):.0%}".replace("%", " %"),
                f"{found.nearest('tp2', two, one, cell):.0%}".replace("%", " %"),
            ]
        )
    head = ["cell", "TP 1 to `tp=1`", "TP 1 to `emulate_tp=2`", "TP 2 to `tp=1`", "TP 2 to `emulate_tp=2`"]
    table([*head, "positions of TP 1 nearer to `tp=1`", "positions of TP 2 nearer to `emulate_tp=2`"], rows)


def main() -> None:
    print("## What vLLM resolved\n")
    print_resolved()
    for kind in KINDS:
        print(f"## Same machine: {kind}\n")
        print_matrices(kind)
        print_floors(kind)
    print("## The published table redone\n")
    print_published()
    print("## On a CPU\n")
    print_cpu()
    print_partial_sums()


if __name__ == "__main__":
    main()
