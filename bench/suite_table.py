"""One table over suites' folders: each pair of configs, its SNR by the published rule and our decision, beside what was published.

    python bench/suite_table.py FOLDER [FOLDER ...]

A folder is what `verifier suite run` leaves. Of each experiment the pairs with its baseline, at generated positions: the mean distance
between the two configs, both ways, over the mean distance of each to its own replay. Where that is 0, a replay has the prover's own bits,
and the test is equality. Decisions are the engine's, of hidden states after block 1 and of log-probabilities.
"""

from __future__ import annotations

import argparse
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
    parser.add_argument("folders", nargs="+", type=Path)
    folders = parser.parse_args().folders
    columns = [list(pairs(json.loads((folder / "experiments.json").read_text()))) for folder in folders]
    for line in table([folder.name for folder in folders], columns):
        print(line)


def pairs(experiments: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """(experiment, config, what was found) for each config beside its experiment's baseline; what did not run says why."""
    for experiment in experiments:
        baselines: dict[str, str] = {}
        for config in experiment["configs"]:  # each prover's baseline comes first
            prover, name = config["prover"], config["config"]
            if baselines.setdefault(prover, name) == name:
                continue
            if config["state"] != "finished":
                yield experiment["name"], name, f"{config['state']}: {config['reason'].split(' (')[0]}"
                continue
            found = [_cell(experiment, prover, {baselines[prover], name}, *cell) for cell in CELLS]
            yield experiment["name"], name, "; ".join(found)
        if experiment["skipped"]:
            yield experiment["name"], "", f"skipped: {experiment['skipped']}"


def _cell(experiment: Mapping[str, Any], prover: str, names: set[str], signal: str, layer: str) -> str:
    for matrix in experiment["matrices"].get(prover, []):
        if (matrix["phase"], matrix["signal"], matrix["layer"]) != ("decode", signal, layer):
            continue
        for pair in matrix["pairwise"]:
            if {pair["a"], pair["b"]} == names:
                return f"{_ratio(pair)} {pair['decision']['verdict']}"
    return "not replayed"


def _ratio(pair: Mapping[str, Any]) -> str:
    if pair["noise"] == 0:
        return "equal" if pair["signal"] == 0 else f"unequal ({pair['signal']:.3g})"
    return f"{pair['snr']:.2f}"


def table(names: Sequence[str], columns: Sequence[Sequence[tuple[str, str, str]]]) -> Iterator[str]:
    """Markdown, a row for each config that any folder has."""
    cells = [{(experiment, config): found for experiment, config, found in column} for column in columns]
    rows = list(dict.fromkeys(key for column in cells for key in column))
    yield f"| experiment | config | published | {' | '.join(f'{name}: block 1; log-probabilities' for name in names)} |"
    yield "| --- " * (3 + len(names)) + "|"
    for experiment, config in rows:
        found = " | ".join(column.get((experiment, config), "—") for column in cells)
        yield f"| {experiment} | `{config}` | {PUBLISHED.get(experiment, NOT_PUBLISHED)} | {found} |"


if __name__ == "__main__":
    main()
