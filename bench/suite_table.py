"""One table over suites' folders: each config beside its experiment's baseline, by the published rule and by our decision, and what was published.

    python bench/suite_table.py NAME=FOLDER[,FOLDER ...] [NAME=FOLDER ...]

A folder is what `verifier suite run` leaves; its two JSON files may be gzipped. A column for each NAME holds, of each config:

- *sessions*: the mean distance of log-probabilities at prompt positions between its session and the baseline's, on the prover's machine;
  0 says equal bits.
- two SNRs with our decisions, at generated positions: of hidden states after block 1 and of log-probabilities. The mean distance between the
  two configs, both ways, over the mean distance of each to its own replay. *One replay*: this verifier computes both configs with the same
  bits, so that it cannot tell them apart.
- of concurrent work the verdicts on numbers and on time.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

CELLS = (("hidden_states", "1"), ("logprobs", ""))
NOT_PUBLISHED = "not published"
PUBLISHED = {
    "batch_size": "0 to 1.32 (last hidden state)",
    "quantization": "81.1 (log-probabilities, AWQ or GPTQ)",
    "attention": "5.8 (log-probabilities, eager or sdpa), 1.0 (sdpa or FA2)",
    "tensor_parallel": "0.90 (log-probabilities, prompt positions; TP 1, 2, 4)",
    "concurrent_streams": "numbers untouched, slower",
}
"""SNR, A100 against H100, at generated positions unless said otherwise; sources: docs/vllm-evidence.md."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("columns", nargs="+", metavar="NAME=FOLDER[,FOLDER]")
    named = [text.partition("=") for text in parser.parse_args().columns]
    columns = [[row for folder in folders.split(",") for row in pairs(Path(folder))] for _, _, folders in named]
    for line in table([name for name, _, _ in named], columns):
        print(line)


def read(folder: Path, name: str) -> Any:
    """The JSON of ``folder/name``, or of its gzipped form."""
    plain = folder / name
    return json.loads(plain.read_bytes() if plain.exists() else gzip.decompress((folder / f"{name}.gz").read_bytes()))


def pairs(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(experiment, config, what was found) for each config beside its experiment's baseline; what did not run says why."""
    reports = read(folder, "analysis_reports.json")
    for experiment in read(folder, "experiments.json"):
        baselines: dict[str, str] = {}
        for config in experiment["configs"]:  # each prover's baseline comes first
            prover, name = config["prover"], config["config"]
            if baselines.setdefault(prover, name) == name:
                continue
            if config["state"] != "finished":
                yield experiment["name"], name, f"{config['state']}: {config['reason'].split(' (')[0]}"
                continue
            found = [_sessions(reports[experiment["name"]], f"{prover}_{baselines[prover]}", f"{prover}_{name}")]
            found += [_cell(experiment, prover, {baselines[prover], name}, *cell) for cell in CELLS]
            found += [
                f"numbers {work['numbers']}, time {work['time']}"
                for work in experiment["forensics"]
                if work["config"] == f"{prover}_{name}"
            ]
            yield experiment["name"], name, "; ".join(found)
        if experiment["skipped"]:
            yield experiment["name"], "", f"skipped: {experiment['skipped']}"


def _sessions(report: Mapping[str, Any], baseline: str, name: str) -> str:
    """The distance between two of the prover's own sessions."""
    found = report["prefill"]["logprobs"]
    at = [found["configs"].index(each) for each in (baseline, name)]
    return f"sessions {found['matrix'][at[0]][at[1]]:.3g}"


def _cell(experiment: Mapping[str, Any], prover: str, names: set[str], signal: str, layer: str) -> str:
    for matrix in experiment["matrices"].get(prover, []):
        if (matrix["phase"], matrix["signal"], matrix["layer"]) != ("decode", signal, layer):
            continue
        for pair in matrix["pairwise"]:
            if {pair["a"], pair["b"]} == names:
                return "one replay" if pair["same_kernel_class"] else f"{_ratio(pair)} {pair['decision']['verdict']}"
    return "not replayed"


def _ratio(pair: Mapping[str, Any]) -> str:
    if pair["noise"] == 0:
        return "equal" if pair["signal"] == 0 else f"unequal ({pair['signal']:.3g})"
    return f"{pair['snr']:.2f}"


def table(names: Sequence[str], columns: Sequence[Sequence[tuple[str, str, str]]]) -> Iterator[str]:
    """Markdown, a row for each config that any column has, experiment by experiment."""
    cells = [{(experiment, config): found for experiment, config, found in column} for column in columns]
    rows = dict.fromkeys(key for column in cells for key in column)
    order = list(dict.fromkeys(experiment for experiment, _ in rows))
    yield f"| experiment | config | published | {' | '.join(names)} |"
    yield "| --- " * (3 + len(names)) + "|"
    for experiment, config in sorted(rows, key=lambda row: order.index(row[0])):
        found = " | ".join(column.get((experiment, config), "—") for column in cells)
        yield f"| {experiment} | `{config}` | {PUBLISHED.get(experiment, NOT_PUBLISHED)} | {found} |"


if __name__ == "__main__":
    main()
