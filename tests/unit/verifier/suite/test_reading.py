"""Suite files: what is read, and that each complaint names file, table, key, value and the way out."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from suite_world import TOML

from fpforensics.common.errors import UsageError
from fpforensics.verifier.cli.suite import suite as command
from fpforensics.verifier.suite.plan import describe, model_loads, plan_jobs, plan_replays, session_plan
from fpforensics.verifier.suite.reading import BUILTIN, builtin_text, find_suite, parse_suite

NINE = [
    "batch_size",
    "compile",
    "quantization",
    "attention",
    "concurrent_streams",
    "cuda_version",
    "tensor_parallel",
    "expert_parallel",
]


FOLDER = Path(__file__).parents[4] / "examples" / "suites"
EXAMPLES = sorted(FOLDER.glob("*.toml"))


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin(name: str) -> None:
    suite = find_suite(name)
    assert suite.name == name
    jobs = plan_jobs(suite)
    assert jobs[0].variant.identity == suite.baseline.identity
    assert model_loads(jobs) == len({job.variant.identity for job in jobs})  # each config is loaded once
    for job in jobs:
        session_plan(suite, job.variant, "")
    assert suite.title in describe(suite)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(path: Path) -> None:
    done = CliRunner().invoke(command, ["validate", str(path)])
    assert done.exit_code == 0, done.output
    suite = find_suite(str(path))
    assert (suite.name, [each.name for each in suite.experiments]) == (path.stem, NINE)


def test_the_rehearsal_of_two_gpus_differs_in_what_a_cpu_runs_alone() -> None:
    there, here = (find_suite(str(FOLDER / f"{name}.toml")) for name in ("two-gpus-vllm", "two-ranks-vllm-cpu"))
    for name in ("baseline", "references", "capture", "replay", "repetitions"):
        assert getattr(there, name) == getattr(here, name)
    other = [ours.name for theirs, ours in zip(there.experiments, here.experiments, strict=True) if theirs != ours]
    assert other == ["quantization", "attention"]
    # One replay for all that transformers runs alike; formats that only vLLM has are not replayed without it.
    replays = {each.name: each.variant.config for each in plan_replays(there)}
    assert list(replays) == [
        "baseline",
        "model=moe-awq_quant=awq_marlin",
        "model=moe-gptq_quant=gptq_marlin",
        "quant=bnb-nf4",
        "quant=fp8",
        "cu118",
        "tp=2",
    ]
    assert [name for name, config in replays.items() if config.backend == "vllm"] == ["quant=fp8"]


def test_megaplan_is_the_plan() -> None:
    suite = find_suite("megaplan")
    assert [each.name for each in suite.experiments] == NINE
    assert suite.experiments[0].file == "batch_size_experiment.json"
    assert [each.name for each in find_suite("megaplan-smollm2").experiments] == NINE
    assert (suite.repetitions, suite.references.prompt_tokens, suite.references.new_tokens) == (3, 6000, 31)
    assert suite.capture.layers == ("1", "2", "4", "12", "last")
    assert (suite.capture.top_k, suite.capture.prefill_positions) == (10, 3)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("repetitions = 2", "repetition = 2", ["unknown key 'repetition' = 2", "did you mean 'repetitions'?"]),
        ("repetitions = 2", "repetitions = 0", ["repetitions = 0", "from 1 to 20"]),
        ("top_k = 4", "topk = 4", ["[capture]", "'topk' = 4", "'top_k'"]),
        ('"attn=eager"', '"attn=eagr"', ["[experiment[0]]", "attn=eagr", "did you mean 'eager'?"]),
        ('"attn=eager"', '"attn=sdpa"', ["[experiment[0]]", "the baseline itself"]),
        ("[references]", '[replay]\nusing = "dtype=fp32"\n[references]', ["[replay]", "using", "backend=transformers"]),
        ('variable = "attn"', "variable = 7", ["[experiment[0]]", "variable = 7", "a string"]),
        ('values = ["attn=eager"]', "", ["values is missing"]),
        ('name = "expert_parallel"', 'name = "attention"', ["experiment 'attention' is given twice"]),
        ('name = "attention"', 'name = "../up"', ["name = '../up'", "lower-case"]),
        ('name = "attention"', 'name = "reference"', ["'reference' is given twice"]),
        ("count = 2", "count = true", ["[references]", "count = True", "whole number"]),
        ('layers = ["1", "2", "last"]', 'layers = ["1", "first"]', ["[capture]", "layers", '"last"']),
        ("[references]", "[replay]\nmode = 'decod'\n[references]", ["[replay]", "'decod'", "did you mean 'decode'?"]),
        ("[references]", "[[prover]]\nendpoint = 'here'\n[references]", ["[prover[0]]", "host:port"]),
        ("[references]", "[[references]]", ["references", "a table"]),
        ('name = "tiny"', 'name = "tiny', ["tiny.toml is not TOML"]),
    ],
)
def test_complaints(old: str, new: str, said: list[str]) -> None:
    assert old in TOML
    with pytest.raises(UsageError) as caught:
        parse_suite(TOML.replace(old, new, 1), "tiny.toml")
    text = caught.value.diagnostics()
    for part in ["tiny.toml", *said]:
        assert part in text
    assert caught.value.hint


def test_shared_baseline_and_other_baselines() -> None:
    suite = parse_suite(
        TOML
        + '\n[[experiment]]\nname = "more"\nvariable = "dtype"\nbaseline = "attn=eager"\nvalues = ["dtype=fp32"]\n',
        "x",
    )
    jobs = plan_jobs(suite)
    assert [job.id for job in jobs] == [
        "local.baseline",
        "local.attn=eager",
        "local.emulate_tp=2",
        "local.ep=2",
        "local.concurrent=true",
        "local.dtype=fp32",
    ]
    assert jobs[1].experiments == ("attention", "more")  # a variant here, a baseline there: one job
    assert jobs[2].loads == 2


def test_environment_needs_a_local_prover() -> None:
    suite = parse_suite(
        TOML.replace("[references]", "[[prover]]\nname = 'far'\nendpoint = '10.0.0.5:1'\n[references]")
        + '\n[[experiment]]\nname = "cuda"\nvariable = "cuda"\n[[experiment.variant]]\nname = "old"\npython = "/x"\n',
        "x",
    )
    (job,) = [job for job in plan_jobs(suite) if job.id == "far.old"]
    assert "operator of a remote prover" in job.skip


def test_commands(tmp_path: Path) -> None:
    runner = CliRunner()
    assert "megaplan-smollm2" in runner.invoke(command, ["list"]).output
    assert "model loads" in runner.invoke(command, ["show", "megaplan"]).output
    file = tmp_path / "mine.toml"
    file.write_text(runner.invoke(command, ["show", "attention", "--toml"]).output)
    done = runner.invoke(command, ["validate", str(file)])
    assert done.exit_code == 0
    assert "valid: attention, 3 configs" in done.output
    for wrong in (
        ["show", "megaplam"],
        ["show", str(file), "--toml"],
    ):
        assert isinstance(runner.invoke(command, wrong).exception, UsageError)


def test_validate_takes_what_run_takes(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(builtin_text("quantization"))
    done = CliRunner().invoke(command, ["validate", *BUILTIN, str(file)])
    assert done.exit_code == 0, done.exception
    said = [line.partition(",")[0] for line in done.output.splitlines()]
    assert said == [*(f"{name}: valid: {name}" for name in BUILTIN), f"{file}: valid: quantization"]


def test_validate_names_every_wrong_suite(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "deep": ('"2", "last"', '"5", "last"'),  # the tiny model has four blocks
        "nowhere": ('"2", "last"', '"5000"'),
        "good": ('"2", "last"', '"4", "last"'),
        "typo": ("top_k", "topk"),
        "elsewhere": ("model=tiny,", "model=not-here/at-all,"),
        "empty": ("model=tiny,", "model=./no-model,"),
        "stored": ("model=tiny,", "model=tiny,quant=gptq,"),
    }
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tiny.parent)
    (tiny.parent / "no-model").mkdir(exist_ok=True)
    names = []
    for name, (old, new) in files.items():
        document = tmp_path / "document.txt"
        document.write_text("A text.")
        toml = (
            TOML.replace("DOCUMENT", str(document)).replace(old, new, 1).replace("model=tiny,", f"model=./{tiny.name},")
        )
        names.append(str(tmp_path / f"{name}.toml"))
        Path(names[-1]).write_text(toml)
    done = CliRunner().invoke(command, ["validate", *names, "megaplam", str(tmp_path / "none.toml")])
    assert done.exit_code == 2
    wrong = done.stderr.splitlines()
    assert len(wrong) == 7
    assert "deep.toml: layer 5: the model ./tiny has 4 blocks (name blocks from 1 to 4" in wrong[0]
    assert "nowhere.toml: [capture]: layers = '5000' (give block numbers from 1 to 4096" in wrong[1]
    assert all(
        each in line
        for each, line in zip(
            ("topk", "no config.json", "stored unquantized", "megaplam", "none.toml"), wrong[2:], strict=True
        )
    )
    good, elsewhere = done.stdout.splitlines()
    assert good.endswith("good.toml: valid: tiny, 5 configs, 6 model loads")
    assert elsewhere.endswith("; layers not compared with not-here/at-all: not on this machine")


def test_an_experiment_that_is_skipped_needs_no_values() -> None:
    suite = parse_suite(TOML, "tiny.toml")
    (skipped,) = [each for each in suite.experiments if each.skip]
    assert (skipped.name, skipped.variants) == ("cuda_version", ())
    assert not [job for job in plan_jobs(suite) if "cuda" in job.id]


@pytest.mark.parametrize("name", ["megaplan", "megaplan-smollm2"])
def test_concurrent_work_is_part_of_the_plan(name: str) -> None:
    suite = find_suite(name)
    assert not [each.name for each in suite.experiments if each.skip]
    (job,) = [job for job in plan_jobs(suite) if job.variant.config.concurrent_work]
    assert job.experiments == ("concurrent_streams",)
    assert msgspec.structs.replace(job.variant.config, concurrent_work=False) == suite.baseline.config
