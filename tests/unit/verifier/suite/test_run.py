"""A suite's run: what it leaves, what it skips, and that a broken one goes on where it ended."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from fake_engine import drifting_engine
from suite_world import FINISHED, TOML, Starts, make, opened, results, run

from fpforensics.common.keys import Keyring
from fpforensics.common.lab.reader import open_experiment
from fpforensics.verifier.intake import open_bundle
from fpforensics.verifier.suite.folder import Folder
from fpforensics.verifier.suite.journal import read_journal


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def kill() -> None:
    raise Killed


def test_files(unbroken: Path) -> None:
    names = {path.name for path in unbroken.iterdir()}
    assert {
        "attention_experiment.json",
        "tensor_parallel_experiment.json",
        "reference_baseline.json",
        "analysis_reports.json",
        "summary.json",
        "report.html",
        "journal.jsonl",
    } <= names
    assert {path.stem for path in (unbroken / "bundles").iterdir()} == set(FINISHED)
    assert not list((unbroken / ".incoming").iterdir())
    with open_experiment(unbroken / "attention_experiment.json") as experiment:
        experiment.validate()
        assert [each.config_id for each in experiment.configurations] == ["local_baseline", "local_attn=eager"]
        assert experiment.metadata["experiment_type"] == "attention"


def test_bundles_are_signed(unbroken: Path) -> None:
    keyring = Keyring.from_paths([unbroken / "local.key.pub"])
    for name in FINISHED:
        with open_bundle(unbroken / "bundles" / f"{name}.msgpack", keyring) as bundle:
            bundle.verify_all()


def test_skipped_with_reasons(unbroken: Path) -> None:
    experiments = {each["name"]: each for each in json.loads((unbroken / "experiments.json").read_text())}
    (config,) = [each for each in experiments["expert_parallel"]["configs"] if each["config"] == "ep=2"]
    assert config["state"] == "skipped"
    assert "ep=2" in config["reason"]
    assert experiments["cuda_version"]["skipped"] == "no other interpreter here"
    page = (unbroken / "report.html").read_text()
    assert "tiny: transformers, none, sdpa, bf16" in page
    assert "in decode mode, on auto" in page
    assert "no other interpreter here" in page
    assert "src=" not in page
    assert "<script" not in page


def test_matrices(unbroken: Path) -> None:
    experiments = {each["name"]: each for each in json.loads((unbroken / "experiments.json").read_text())}
    matrices = experiments["attention"]["matrices"]["local"]
    assert {(each["phase"], each["signal"]) for each in matrices} == {
        (phase, signal) for phase in ("prefill", "decode") for signal in ("logprobs", "key_vectors", "hidden_states")
    }
    for each in matrices:
        assert each["rows"] == each["columns"] == ["baseline", "attn=eager"]
        assert each["aggregate"][0][0] == 0.0  # the same machine, the same config: the same bits
        assert all("decision" in pair and "label" in pair for pair in each["pairwise"])


def test_nothing_is_decided_about_what_left_no_evidence(unbroken: Path, tiny: Path, tmp_path: Path) -> None:
    setting = make(tmp_path / "run", tiny, start=Starts(engine=drifting_engine))
    run(setting)
    for folder, pairs in ((unbroken, 1), (setting.folder.path, 0)):
        attention, *_ = json.loads((folder / "experiments.json").read_text())
        for each in attention["matrices"]["local"]:
            assert each["columns"] == ["baseline", "attn=eager"]
            assert (len(each["rows"]), len(each["pairwise"])) == (1 + pairs, pairs)


def test_loads_are_least(tiny: Path, tmp_path: Path) -> None:
    setting = make(tmp_path / "run", tiny)
    run(setting)
    starts = setting.start
    assert isinstance(starts, Starts)
    # Three configs once, one twice for its reloads; then each of the four once to replay.
    assert len(starts.configs) == 3 + 2 + 4


def test_what_is_run_alike_is_replayed_once(tiny: Path, tmp_path: Path) -> None:
    given = '[replay]\nusing = "matmul=fp32-rounded"\n[references]'
    toml = TOML.replace("[references]", given).replace('"attn=eager"', '"attn=eager", "matmul=fp32-rounded"')
    setting = make(tmp_path / "run", tiny, toml)
    run(setting)
    assert {each.stem for each in setting.folder.replays.iterdir()} == {
        "baseline",
        "attn=eager",
        "emulate_tp=2",
        "concurrent=true",
    }
    attention, *_ = json.loads((setting.folder.path / "experiments.json").read_text())
    for each in attention["matrices"]["local"]:
        assert each["rows"] == each["columns"] == ["baseline", "attn=eager", "matmul=fp32-rounded"]
        assert all(row[0] == row[2] for row in each["aggregate"])
        classes = {(pair["a"], pair["b"]): pair["same_kernel_class"] for pair in each["pairwise"]}
        assert classes["baseline", "matmul=fp32-rounded"]


@pytest.mark.parametrize("at", [1, 2, 4, 6, 9])
def test_killed_and_resumed(unbroken: Path, tiny: Path, tmp_path: Path, at: int) -> None:
    with pytest.raises(Killed):
        run(make(tmp_path / "run", tiny, start=Starts(at, kill)))
    setting = opened(tmp_path / "run")
    run(setting)
    assert results(tmp_path / "run") == results(unbroken)
    ended = Counter((entry.job, entry.event) for entry in read_journal(tmp_path / "run" / "journal.jsonl"))
    assert all(count == 1 for (_, event), count in ended.items() if event != "started")
    assert isinstance(setting.start, Starts)
    assert len(setting.start.configs) == 9 - (at - 1)  # nothing that was finished is loaded again


def test_killed_between_bundle_and_journal(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accept = Folder.accept

    def then_killed(self: Folder, incoming: Path, session: str) -> Path:
        accept(self, incoming, session)
        raise Killed

    monkeypatch.setattr(Folder, "accept", then_killed)
    with pytest.raises(Killed):
        run(make(tmp_path / "run", tiny))
    monkeypatch.undo()
    digest = (tmp_path / "run" / "bundles" / "local.baseline.msgpack").read_bytes()
    run(opened(tmp_path / "run"))
    assert (tmp_path / "run" / "bundles" / "local.baseline.msgpack").read_bytes() == digest


def test_resuming_what_is_done_does_nothing(unbroken: Path) -> None:
    before = results(unbroken), (unbroken / "journal.jsonl").read_bytes()
    setting = opened(unbroken)
    run(setting)
    assert isinstance(setting.start, Starts)
    assert setting.start.configs == []
    assert (results(unbroken), (unbroken / "journal.jsonl").read_bytes()) == before
