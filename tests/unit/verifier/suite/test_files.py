"""The files of a run: one machine or two, times, the page, and configs that could not be replayed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from fake_engine import FakeEngine, starter
from page_parser import Page
from suite_world import TOML, Starts, make, opened, run

from fpforensics.common.config import parse_config
from fpforensics.common.errors import ReplayError
from fpforensics.common.lab.reader import open_experiment
from fpforensics.verifier.suite.journal import Entry, read_journal
from fpforensics.verifier.suite.model import Variant
from fpforensics.verifier.suite.page import render
from fpforensics.verifier.suite.plan import plan_jobs
from fpforensics.verifier.suite.suite import render_states
from fpforensics.verifier.suite.timing import Timing, compared, counted, slowdown_interval, timings

TWO = """
[[prover]]
name = "a"
labels = { gpu = "A100" }
[[prover]]
name = "b"
labels = { gpu = "H100" }
[references]"""


def test_two_provers(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(make(folder, tiny, TOML.replace("[references]", TWO, 1)))
    with open_experiment(folder / "attention_experiment.json") as experiment:
        assert [(each.config_id, each.hardware) for each in experiment.configurations] == [
            ("a_baseline", "A100"),
            ("a_attn=eager", "A100"),
            ("b_baseline", "H100"),
            ("b_attn=eager", "H100"),
        ]
    rows = [row for row in json.loads((folder / "summary.json").read_text()) if row["experiment"] == "attention"]
    assert len(rows) == 6
    for row in rows:
        assert row["baseline_l2"] == 0.0  # the same arithmetic under two names
        assert row["max_signal_l2"] > 0
        assert row["snr_infinite"]
    experiments = {each["name"]: each for each in json.loads((folder / "experiments.json").read_text())}
    assert set(experiments["attention"]["matrices"]) == {"a", "b"}


def test_timing(unbroken: Path) -> None:
    experiments = {each["name"]: each for each in json.loads((unbroken / "experiments.json").read_text())}
    base, other = experiments["tensor_parallel"]["timing"]
    assert base["slowdown"] is None
    assert len(base["seconds"]) == len(other["seconds"]) == 2  # one worker, and two
    # Each of its repetitions is the first of a worker, of the baseline's one is.
    assert other["slowdown"] == pytest.approx(other["mean"] / base["seconds"][0])
    assert (base["cold"], other["cold"], other["interval"]) == (False, True, None)
    (_, alike) = experiments["attention"]["timing"]
    base = experiments["attention"]["timing"][0]
    assert (alike["slowdown"], alike["cold"]) == (pytest.approx(alike["mean"] / base["mean"]), False)
    text = " ".join((unbroken / "report.html").read_text().split())
    assert text.count("first repetition of the baseline's worker") == 1  # under the one experiment with reload


def test_cold_repetitions_are_compared_with_cold_ones(unbroken: Path) -> None:
    """Generating takes 2 s and the first in a worker 5 s: a new worker for each repetition made nothing slower."""
    setting = opened(unbroken)
    (experiment,) = [each for each in setting.suite.experiments if each.name == "tensor_parallel"]
    jobs = plan_jobs(setting.suite)

    def times(seconds: dict[str, tuple[float, ...]]) -> list[Timing]:
        ended = {job: Entry(event="finished", job=job, wall_seconds=wall) for job, wall in seconds.items()}
        return list(timings(setting, experiment, jobs, ended))

    base, other = times({"local.baseline": (5.0, 2.0, 2.1), "local.emulate_tp=2": (5.1, 5.0, 4.9)})
    assert (base.mean, base.slowdown, other.mean) == (pytest.approx(2.05), None, 5.0)
    assert (other.slowdown, other.interval, other.cold) == (1.0, None, True)
    assert times({"local.emulate_tp=2": (5.1, 5.0, 4.9)}) == []  # nothing to compare with


def test_what_is_compared() -> None:
    warm, cold = (Variant(name="x", config=parse_config("model=m"), reload=reload) for reload in (False, True))
    ours, theirs = (5.0, 2.5, 2.4), (5.0, 2.0, 2.1)
    assert compared(ours, warm, theirs) == (ours[1:], theirs[1:])
    assert compared(ours, cold, theirs) == (ours, (5.0,))


@pytest.mark.parametrize(
    ("seconds", "reload", "left"),
    [
        ((5.0, 2.5, 2.4), False, (2.5, 2.4)),
        ((5.0, 2.5, 2.4), True, (5.0, 2.5, 2.4)),  # each in a worker of its own
        ((5.0, 2.5), False, (5.0, 2.5)),
        ((5.0,), False, (5.0,)),
    ],
)
def test_the_repetition_that_warms_up_is_not_counted(
    seconds: tuple[float, ...], reload: bool, left: tuple[float, ...]
) -> None:
    assert counted(seconds, Variant(name="x", config=parse_config("model=m"), reload=reload)) == left


def test_slowdown_interval() -> None:
    assert slowdown_interval([2.0], [1.0, 1.1]) is None
    assert slowdown_interval([2.0, 2.0], [1.0, 1.0]) == (2.0, 2.0)
    assert slowdown_interval([2.0, 2.0], [0.0, 0.0]) is None  # a prover may sign that
    low, high = slowdown_interval([2.0, 2.1, 1.9], [1.0, 1.02, 0.98]) or (0.0, 0.0)
    assert 1.5 < low < 2 < high < 2.5
    assert slowdown_interval([2.0, 2.1], [1.0, 5.0]) is None  # a baseline that may be nothing


def test_page(unbroken: Path) -> None:
    text = (unbroken / "report.html").read_text()
    page = Page(text)
    assert not page.tags & {"script", "img", "link", "iframe", "object", "form", "base"}
    places = [page.text.index(part) for part in ("tiny", "Summary", "What ran", "attention", "95 % interval")]
    assert places[:3] == sorted(places[:3])
    for phase in ("prefill", "decode"):
        assert f"{phase}: between the provers' own runs" in page.text
        assert f"{phase}: claimed on local × verified here" in page.text
        assert f"Layer by layer, {phase}" in page.text
    for name in ("attention_experiment.json", "summary.json", "reference_baseline.json"):
        assert f'href="{name}"' in text


def test_names_in_a_suite_are_escaped(tiny: Path, tmp_path: Path) -> None:
    run(make(tmp_path / "run", tiny, TOML.replace('title = "A tiny suite"', 'title = "<script>alert(1)</script>"')))
    assert "<script" not in (tmp_path / "run" / "report.html").read_text()


def with_eager(kind: type[FakeEngine]) -> Starts:
    """Engines of which those with eager attention are of this kind."""
    return Starts(
        engine=starter(lambda config, host: (kind if config.attention == "eager" else FakeEngine)(config, host))
    )


def attention(folder: Path) -> dict[str, Any]:
    experiments = {each["name"]: each for each in json.loads((folder / "experiments.json").read_text())}
    found = experiments["attention"]
    assert isinstance(found, dict)
    return found


def test_tokens_that_diverged_are_said(tiny: Path, tmp_path: Path) -> None:
    """Rather than a dash, as if nobody had measured."""

    class OtherTokens(FakeEngine):
        def _logits(self, tokens: Any) -> Any:
            return np.roll(super()._logits(tokens), 1)

    folder = tmp_path / "run"
    run(make(folder, tiny, start=with_eager(OtherTokens)))
    rows = json.loads((folder / "summary.json").read_text())
    said = {(each["experiment"], each["phase"]): each["unmeasured"] for each in rows}
    assert said["attention", "decode"] == "tokens diverged from step 0 on"
    assert said["attention", "prefill"] == said["tensor_parallel", "decode"] == ""
    text = " ".join(Page((folder / "report.html").read_text()).text.split())
    assert "tokens diverged from step 0 on" in text
    assert "local_baseline and local_attn=eager diverged at step 0 on ref_0: no decode distance" in text


def test_what_cannot_be_replayed_is_said(tiny: Path, tmp_path: Path) -> None:
    class NoReplay(FakeEngine):
        def teacher_force(self, *_: Any, **__: Any) -> Any:
            raise ReplayError("no kernel here", "")

    folder = tmp_path / "run"
    setting = make(folder, tiny, start=with_eager(NoReplay))
    written = run(setting)
    assert attention(folder)["replays_skipped"] == {"attn=eager": "no kernel here"}
    assert "Not replayed here, attn=eager: no kernel here" in (folder / "report.html").read_text()
    written.experiments[0] = msgspec.structs.replace(
        written.experiments[0], replays_skipped={"attn=eager": "no kernel here", "baseline": "no kernel here"}
    )
    said = render_states(written).splitlines()
    assert [line for line in said if "no kernel" in line] == ["not replayed: attn=eager, baseline: no kernel here"]
    assert len([line for line in said if "ep=2 needs backend=vllm" in line]) == 2  # a session and a replay
    page = Page(render(setting.suite, written, [])).text
    assert "Not replayed here, attn=eager, baseline: no kernel here" in page
    run(opened(folder), again=True)
    assert attention(folder)["replays_skipped"] == {}
    (matrix, *_) = attention(folder)["matrices"]["local"]
    assert matrix["columns"] == ["baseline", "attn=eager"]


def test_work_that_failed_is_tried_at_resume(tiny: Path, tmp_path: Path) -> None:
    class Crashing(FakeEngine):
        def generate(self, references: Any, sampling: Any, capture: Any, progress: Any = None) -> Any:
            super().generate(references, sampling, capture, progress)
            raise ReplayError("the engine's worker was killed", "")

    folder = tmp_path / "run"
    run(make(folder, tiny, start=with_eager(Crashing)))
    ended = {each.job: each.event for each in read_journal(folder / "journal.jsonl")}
    assert ended["local.attn=eager"] == "failed"
    run(opened(folder))
    ended = {each.job: each.event for each in read_journal(folder / "journal.jsonl")}
    assert ended["local.attn=eager"] == "finished"


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom fpforensics.verifier.cli import cli\n"
        "for words in (['suite', '--help'], ['suite', 'run', '--help'], ['suite', 'show', 'megaplan']):\n"
        "    assert CliRunner().invoke(cli, words).exit_code == 0\n"
        "print(sorted({'torch', 'transformers', 'matplotlib', 'jinja2'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
