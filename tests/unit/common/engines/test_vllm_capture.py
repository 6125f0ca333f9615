"""The recorder alone, without vLLM: steps that only move on, order of rows, and what is no number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import pytest

from fpforensics.common.engines.vllm_jobs import Job, Report, Task
from fpforensics.common.errors import ReplayError
from fpforensics.common.signals import Sampling

torch = pytest.importorskip("torch", reason="pip install '.[hf]'")

VOCABULARY, WIDTH = 11, 3


class Rows:
    """Stands for hooks: each wanted row of the hidden state says which row of which forward it was."""

    def __init__(self) -> None:
        self.forward, self.rows, self.bad = 0, torch.zeros(0, dtype=torch.int64), -1
        self.kept: list[torch.Tensor] = []

    def arm(self, rows_R: torch.Tensor, span: slice | None = None) -> None:  # noqa: N803
        if span is not None:
            assert rows_R.tolist() == list(range(span.start, span.stop))
        self.rows, self.forward = rows_R, self.forward + 1

    def passed(self) -> None:
        states = torch.full((len(self.rows), WIDTH), float(self.forward))
        states[:, 1] = self.rows
        if self.forward == self.bad:
            states[-1, 2] = float("inf")
        self.kept.append(states)

    def collect(self) -> tuple[dict[int, list[torch.Tensor]], dict[int, list[torch.Tensor]]]:
        return {0: self.kept}, {}


def task(number: int, prompt: int, new: int, kept: int) -> Task:
    """``kept`` prompt positions are wanted, and every generated one that is fed."""
    positions = np.arange(prompt - kept, prompt + new - 1, dtype=np.int32)
    return Task(
        key=f"r{number}", reference_id=f"ref_{number}", fed_ids=np.arange(prompt, dtype=np.int32), positions=positions
    )


Forward = tuple[Sequence[int], Sequence[int], Sequence[int]]  # tasks, starts, lengths


def record(
    tasks: list[Task], forwards: Iterator[Forward], bad: int = -1, capture: bool = True, lost: int = 0
) -> Report:
    """``bad``: the forward with a row that is no number; ``lost``: how many rows of the last one are not kept."""
    from fpforensics.common.engines.vllm_capture import Recorder

    taps = Rows()
    taps.bad = bad
    job = Job(tasks=tasks, blocks=[0], top_k=2, full_logits=False, sampling=Sampling(), capture=capture)
    product = lambda states: torch.zeros(len(states), VOCABULARY)  # noqa: E731
    recorder = Recorder(job, taps, product, torch.device("cpu"), (0, 0))  # type: ignore[arg-type]
    for numbers, starts, lengths in forwards:
        recorder.before_forward([f"r{number}-0" for number in numbers], np.array(starts), np.array(lengths))
        recorder.after_forward(torch.zeros(int(sum(lengths)), WIDTH))
        recorder.choose_tokens(torch.zeros(len(numbers), VOCABULARY))
    if lost:
        taps.kept[-1] = taps.kept[-1][lost:]
    return recorder.finish()


def test_rows_of_steps_that_move_on_are_each_ones_own() -> None:
    def forwards() -> Iterator[Forward]:
        yield (0, 1), (0, 0), (4, 6)
        for step in range(3):
            yield (0, 1), (4 + step, 6 + step), (1, 1)
        yield (1,), (9,), (1,)  # the first is through

    report = record([task(0, 4, 4, 2), task(1, 6, 5, 1)], forwards())
    assert (report.failed, report.finite, report.phases) == ("", True, ["prefill", "decode"])
    first, second = (rows.hidden[0][:, :2].tolist() for rows in report.rows)
    assert first == [[1, 2], [1, 3], [2, 0], [3, 0], [4, 0]]
    assert second == [[1, 9], [2, 1], [3, 1], [4, 1], [5, 0]]


def test_a_prompts_last_token_alone_is_prefill_and_what_follows_is_not() -> None:
    def forwards() -> Iterator[Forward]:
        yield (0,), (0,), (2,)
        for start in range(2, 6):
            yield (0,), (start,), (1,)

    assert record([task(0, 3, 4, 1)], forwards()).phases == ["prefill", "decode"]


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("back", [((0,), (0,), (6,)), ((0,), (4,), (1,))])  # from the start; and one position alone
def test_an_interruption_in_a_run_of_steps_is_no_evidence(back: Forward, capture: bool) -> None:
    def forwards() -> Iterator[Forward]:
        yield (0,), (0,), (4,)
        yield (0,), (4,), (1,)
        yield (0,), (5,), (1,)
        yield back

    one = task(0, 4, 8, 1)
    if not capture:
        one = msgspec.structs.replace(one, positions=one.positions[:0])
    assert "ref_0 was interrupted at position 6" in record([one], forwards(), capture=capture).failed


def test_steps_of_a_run_are_not_placed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from fpforensics.common.engines.vllm_capture import Recorder

    def forwards() -> Iterator[Forward]:
        yield (0, 1), (0, 0), (4, 6)
        for step in range(8):
            yield (0, 1), (4 + step, 6 + step), (1, 1)

    placed: list[int] = []
    plain = Recorder._placed
    monkeypatch.setattr(
        Recorder, "_placed", lambda self, ids, *rest: placed.append(len(ids)) or plain(self, ids, *rest)
    )
    both = [task(0, 4, 10, 1), task(1, 6, 10, 1)]
    record(both, forwards())
    assert placed == [2, 2]  # the prompts, and the first step
    record([msgspec.structs.replace(each, positions=each.positions[:0]) for each in both], forwards(), capture=False)
    assert placed == [2, 2, 2, 2]


def test_a_row_that_was_not_kept_is_noticed() -> None:
    def forwards() -> Iterator[Forward]:
        yield (0,), (0,), (4,)
        yield (0,), (4,), (1,)

    with pytest.raises(ReplayError, match="2 rows were kept of 3"):
        record([task(0, 4, 3, 2)], forwards(), lost=1)


def test_a_row_that_is_no_number_is_noticed() -> None:
    def forwards() -> Iterator[Forward]:
        yield (0,), (0,), (4,)
        for step in range(3):
            yield (0,), (4 + step,), (1,)

    assert record([task(0, 4, 4, 1)], forwards(), bad=3).finite is False


def test_steps_of_a_job_without_capture_are_followed_too() -> None:
    """Nothing of it is kept; an interruption is still seen."""

    def forwards(back: int) -> Iterator[Forward]:
        yield (0, 1), (0, 0), (4, 6)
        for step in range(3):
            yield (0, 1), (4 + step, 6 + step), (1, 1)
        yield (1,), (9 - back,), (1 + back,)

    silent = [
        msgspec.structs.replace(each, positions=each.positions[:0]) for each in (task(0, 4, 4, 0), task(1, 6, 5, 0))
    ]
    through = record(silent, forwards(0), capture=False)
    assert (through.failed, through.rows, through.phases) == ("", [], ["prefill", "decode"])
    assert through.steps == [(2, 10), (2, 2), (2, 2), (2, 2), (1, 1)]
    assert "ref_1 was interrupted at position 9" in record(silent, forwards(2), capture=False).failed


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")],
        ),
    ],
)
@pytest.mark.parametrize("vocabulary", [300, 12_000, 49_152, 128_256])
@pytest.mark.parametrize("claimed", [False, True])
def test_rows_of_many_steps_are_reduced_as_each_alone(
    device: str, vocabulary: int, claimed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ties included, of which logits in bfloat16 have many: the same ids in the same order, however many rows wait.

    On a GPU, 3 rows of 12000 go through another kernel than 30 do.
    """
    from fpforensics.common.engines import vllm_capture

    prompts, new = (4, 6, 5), 12
    tasks = [task(i, prompt, new, 2) for i, prompt in enumerate(prompts)]
    if claimed:
        ids = np.random.default_rng(1).integers(0, vocabulary, (len(tasks[0].positions), 5)).astype(np.int32)
        tasks = [msgspec.structs.replace(each, claimed_ids=ids) for each in tasks]
    generator = torch.Generator().manual_seed(0)

    def logits(rows: int) -> torch.Tensor:
        return torch.randn((rows, vocabulary), generator=generator).to(torch.bfloat16).to(device)

    steps: list[tuple[list[int], list[int], list[int]]] = [
        ([0, 1, 2], [0, 0, 0], [4, 6, 3]),
        ([0, 1, 2], [4, 6, 3], [1, 1, 2]),
    ]
    steps += [([0, 1, 2], [5 + i, 7 + i, 5 + i], [1, 1, 1]) for i in range(9)]
    steps += [([1, 2], [16, 14], [1, 1])]  # the first is through
    products = [logits(len(numbers)) for numbers, *_ in steps]
    extra = logits(64)

    def run() -> Report:
        taps = Rows()
        monkeypatch.setattr(
            taps, "passed", lambda: taps.kept.append(torch.zeros((len(taps.rows), WIDTH), device=device))
        )
        monkeypatch.setattr(taps, "arm", lambda rows, span=None: setattr(taps, "rows", rows))
        job = Job(tasks=tasks, blocks=[0], top_k=5, full_logits=True, sampling=Sampling())
        recorder = vllm_capture.Recorder(
            job,
            taps,
            lambda states: extra[: len(states)],
            torch.device(device),
            (0, 0),  # type: ignore[arg-type]
        )
        for (numbers, starts, lengths), deciding in zip(steps, products, strict=True):
            recorder.before_forward([f"r{number}-0" for number in numbers], np.array(starts), np.array(lengths))
            recorder.after_forward(torch.zeros((sum(lengths), WIDTH), device=device))
            recorder.choose_tokens(deciding)
        return recorder.finish()

    together = run()
    reductions: list[int] = []
    plain = vllm_capture.Recorder._reduce

    def reduce(self: vllm_capture.Recorder) -> None:
        reductions.append(sum(len(rows.tokens_m) for rows in self._held))
        plain(self)

    monkeypatch.setattr(vllm_capture.Recorder, "_reduce", reduce)
    run()
    assert max(reductions) > 20  # of many steps
    monkeypatch.setattr(vllm_capture, "_HELD", 1)
    reductions.clear()
    alone = run()
    assert max(reductions) <= len(tasks)
    assert together.finite and alone.finite
    for one, other in zip(together.rows, alone.rows, strict=True):
        assert one.ids is not None and len(one.ids) >= 12
        for name in ("ids", "logprobs", "chosen", "logits"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name
