"""One table over suites' folders: each config beside its experiment's baseline, by the published rule and by our decision, and what was published.

    python bench/suite_table.py NAME=FOLDER[,FOLDER ...] [NAME=FOLDER ...]

A folder is what `verifier suite run` leaves; its two JSON files may be gzipped. A column for each NAME holds, of each config:

- *sessions*: its session against the baseline's, on the prover's machine. Equal, where every token is and every distance is 0; else the mean
  distance of log-probabilities at prompt positions, then at generated ones where the tokens are the same.
- where they differ, two SNRs with our decisions, at generated positions: of hidden states after block 1 and of log-probabilities. The mean
  distance between the two configs, both ways, over the mean distance of each to its own replay. *One replay*: this verifier's replays of
  both configs had the same bits, so that it cannot tell them apart. *Own replays*: one of the two sessions lies more than three times as far
  from its own replay as the other does, and more than half as far as they lie apart: that replay is not of what ran, and no SNR means anything.
- of concurrent work the verdicts on numbers and on time.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

CAPTURED = tuple(product(("prefill", "decode"), ("logprobs", "key_vectors", "hidden_states")))
CELLS = (("block 1", "hidden_states", "1"), ("log-probabilities", "logprobs", ""))
UNLIKE = 3
"""Times as far from its own replay as another config."""
NOT_PUBLISHED = "not published"
_TP = "0.90 (TP 1, 2, 4; prompt positions)"
_BATCH = "0 to 1.32 (last hidden state, within one GPU)"
_AWQ_GPTQ = "AWQ against GPTQ: 81.1"
_EAGER = "eager, sdpa and FA2: 5.8"
PUBLISHED = {
    ("batch_size", "batch=2"): _BATCH,
    ("batch_size", "batch=4"): _BATCH,
    ("quantization", "model=moe-awq_quant=awq_marlin"): _AWQ_GPTQ,
    ("quantization", "model=moe-gptq_quant=gptq_marlin"): _AWQ_GPTQ,
    ("attention", "attn=eager"): _EAGER,
    ("attention", "attn=sdpa"): _EAGER,
    ("attention", "attn=vllm_flash_attn_2"): "sdpa against FA2: 1.0",
    ("tensor_parallel", "emulate_tp=2"): _TP,
    ("tensor_parallel", "emulate_tp=4"): _TP,
    ("tensor_parallel", "tp=2"): _TP,
    ("concurrent_streams", "concurrent=true"): "numbers untouched, slower",
}
"""SNR of log-probabilities at generated positions, A100 against H100, unless said otherwise; docs/vllm-evidence.md says of which models and
engines. Of concurrent streams: the plan's finding."""

Row = tuple[str, str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("columns", nargs="+", metavar="NAME=FOLDER[,FOLDER]")
    columns: dict[str, list[Row]] = {}
    for text in parser.parse_args().columns:
        name, equals, folders = text.partition("=")
        if not (name and equals and folders) or name in columns:
            parser.error(f"{text!r}: write NAME=FOLDER or NAME=FOLDER,FOLDER, each NAME once")
        columns[name] = [row for folder in folders.split(",") for row in pairs(Path(folder))]
    for line in table(columns):
        print(line)


def read(folder: Path, name: str) -> Any:
    """The JSON of ``folder/name``, or of its gzipped form."""
    plain = folder / name
    return json.loads(plain.read_bytes() if plain.exists() else gzip.decompress((folder / f"{name}.gz").read_bytes()))


def pairs(folder: Path) -> Iterator[Row]:
    """(experiment, config, what was found) for each config beside its experiment's baseline; what did not run says why."""
    reports = read(folder, "analysis_reports.json")
    for experiment in read(folder, "experiments.json"):
        report = reports.get(experiment["name"], {})
        several = len({config["prover"] for config in experiment["configs"]}) > 1
        baselines: dict[str, str] = {}
        for config in experiment["configs"]:  # each prover's baseline comes first
            prover, name = config["prover"], config["config"]
            if baselines.setdefault(prover, name) == name:
                continue
            if config["state"] == "finished":
                found = _found(experiment, report, prover, baselines[prover], name)
            else:
                found = f"{config['state']}: {config['reason'].split(' (')[0]}"
            yield experiment["name"], f"{prover}: {name}" if several else name, found
        if experiment["skipped"]:
            yield experiment["name"], "", f"skipped: {experiment['skipped']}"


def _found(experiment: Mapping[str, Any], report: Mapping[str, Any], prover: str, baseline: str, name: str) -> str:
    of_prover = f"{prover}_{baseline}", f"{prover}_{name}"
    distances = {(phase, signal): _between(report, phase, signal, *of_prover) for phase, signal in CAPTURED}
    if set(distances.values()) == {"0"}:
        found = ["sessions equal"]
    else:
        found = [f"sessions {distances['prefill', 'logprobs']}, {distances['decode', 'logprobs']}"]
        found += _decisions(experiment, prover, {baseline, name})
    works = (work for work in experiment["forensics"] if work["config"] == of_prover[1])
    return "; ".join([*found, *(f"numbers {work['numbers']}, time {work['time']}" for work in works)])


def _between(report: Mapping[str, Any], phase: str, signal: str, a: str, b: str) -> str:
    """The distance between two of the prover's own sessions."""
    found = report.get(phase, {}).get(signal)
    if not found or not {a, b} <= set(found["configs"]):
        return "not analyzed"
    if any(set(each["configs"]) == {a, b} for each in found["diverged"]):
        return "tokens differ"
    distance = found["matrix"][found["configs"].index(a)][found["configs"].index(b)]
    return "not compared" if distance is None else f"{distance:.3g}"


def _decisions(experiment: Mapping[str, Any], prover: str, names: set[str]) -> Iterator[str]:
    for label, signal, layer in CELLS:
        matrix = next(
            (
                each
                for each in experiment["matrices"].get(prover, [])
                if (each["phase"], each["signal"], each["layer"]) == ("decode", signal, layer)
            ),
            {"pairwise": []},
        )
        pair = next((pair for pair in matrix["pairwise"] if {pair["a"], pair["b"]} == names), None)
        if pair is None:
            yield "not replayed"
            return
        if pair["same_kernel_class"]:
            yield "one replay"
            return
        own = [matrix["aggregate"][matrix["rows"].index(each)][matrix["columns"].index(each)] for each in sorted(names)]
        if max(own) > UNLIKE * min(own) and max(own) > pair["signal"] / 2:
            yield f"{label} own replays {own[0]:.3g}, {own[1]:.3g}"
        else:
            yield f"{label} {_ratio(pair)} {pair['decision']['verdict']}"


def _ratio(pair: Mapping[str, Any]) -> str:
    """Without noise a replay has the prover's own bits, and the test is equality."""
    if pair["noise"] == 0:
        return "equal" if pair["signal"] == 0 else f"unequal ({pair['signal']:.3g})"
    return f"{pair['snr']:.2f}"


def table(columns: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """Markdown, a row for each config that any column has, experiment by experiment."""
    cells = {
        name: {(experiment, config): found for experiment, config, found in rows} for name, rows in columns.items()
    }
    for name, rows in columns.items():
        if len(cells[name]) < len(rows):
            raise SystemExit(f"column {name!r} holds a config twice: its folders overlap")
    keys = dict.fromkeys(key for column in cells.values() for key in column)
    order = list(dict.fromkeys(experiment for experiment, _ in keys))
    yield f"| experiment | config | published | {' | '.join(columns)} |"
    yield "| --- " * (3 + len(columns)) + "|"
    for key in sorted(keys, key=lambda key: order.index(key[0])):
        found = " | ".join(column.get(key, "—") for column in cells.values())
        yield f"| {key[0]} | `{key[1]}` | {PUBLISHED.get((key[0], key[1].rpartition(': ')[2]), NOT_PUBLISHED)} | {found} |"


if __name__ == "__main__":
    main()
