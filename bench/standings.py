"""The table of ``bench/detection.py``: every method on every task, with intervals and costs, from what was recorded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from detectors import (
    METHODS,
    POSITIONS,
    SDPA,
    SIZES,
    Method,
    Recorded,
    batches,
    rejected_by_snr,
    rejected_by_toploc,
    rejected_by_us,
)
from roc import Floats, Separation, separation

Task = tuple[str, str]
"""(claimed, what ran instead)."""
SHOWN = 16
"""The batch size of the summary."""
RULES: dict[str, Callable[[Recorded, str, str, int], Floats]] = {
    "SNR > 3, logprobs": partial(rejected_by_snr, measure="logprobs"),
    "SNR > 3, keys": partial(rejected_by_snr, measure="keys"),
    "TOPLOC's thresholds": rejected_by_toploc,
    "ours, level 1 %": rejected_by_us,
}
SHORT = {"attn=sdpa,dtype=bf16": "sdpa", "attn=eager": "eager", "emulate_tp=2": "TP 2", "emulate_tp=4": "TP 4"}
SHORT |= {"dtype=fp16": "fp16", "quant=bnb-nf4": "NF4", "quant=torchao-int8": "int8", "wrong-prompt": "other prompt"}

NOTES = """
- A batch is consecutive positions of one prompt; batches do not overlap. The largest is 64 of 1536 positions of the pool: 4.2 %.
- Intervals resample the 24 prompts whole. Where nothing overlaps they shrink to a point: 24 of 24 prompts still only means
  that at least 88 % would be told apart (95 %, exact).
- FPR 1 %: the threshold is the smallest honest score that at most 1 % of the honest batches exceed: of 1536 at 1 position,
  504 at 3, 96 at 16 and 24 at 64. At 16 and 64 it lies above all of them: none of 24 prompts means an FPR of up to 11.7 %.
- `*` marks the best AUC of a column, ties included: then the cheapest of them wins, and that is often not ours.
- s/prompt: replays of one prompt of 240 tokens, one thread of a busy machine, loading the model aside. Ours replays the whole
  lineup and the anchor: five times; without a lineup twice.
- TOPLOC tolerates other kernels by design. Its score here is the mean mantissa error, the best of its three numbers.
  Fewer than 32 positions in a proof cost more: 258 B/token at 1 position, 86 at 3, 16.1 at 16.
- Token-DiFR sees generated tokens only: 9 of each prompt, greedy, all nine at 16 positions. It is meant for hundreds.
- Activation-DiFR's 2 and 8 numbers are one fixed projection of the last hidden state in bf16; ours with k numbers is the
  same idea at blocks 1, 2 and 4 (hidden 1 and 2, keys 2 and 4), in fp16, beside a lineup.
- fp16 rounds less than bf16: at the last layer its evidence lies *nearer*, an AUC under 0.5. Ours has a lane for that.
- Ours in its own favour: its layers were chosen on these recordings. The built-in profile knows none of these prompts. The
  others are as published. `SNR rule moved to block 1` shows how much is the layer alone.
- B/token of ours counts what the score reads; a bundle holds more layers and the logprobs.
"""


def tasks(recorded: Recorded) -> list[Task]:
    return [pair for pair in recorded.pairs if pair[0] != pair[1]]


def standing(recorded: Recorded, method: Method, task: Task, size: int, replicates: int) -> Separation | None:
    """How well a method tells the task's lie from honest evidence of the same claim; None where it has nothing to say."""
    claimed, ran = task
    honest, lies = method.score(recorded, claimed, claimed, size), method.score(recorded, claimed, ran, size)
    return None if honest is None or lies is None else separation(honest, lies, replicates)


def print_standings(recorded: Recorded, replicates: int) -> None:
    prompts = recorded.measured.shape[2]
    print(f"Verifier: {recorded.machine}. {prompts} prompts, resampled {replicates} times.")
    found = {
        (method.name, task, size): standing(recorded, method, task, size, replicates)
        for method in METHODS
        for task in tasks(recorded)
        for size in SIZES
    }

    def best(task: Task, size: int) -> float:
        return max(
            round(each.auc.value, 3)
            for name, at, of in found
            if (at, of) == (task, size) and (each := found[name, at, of])
        )

    def cell(method: Method, task: Task, size: int, intervals: bool) -> str:
        each = found[method.name, task, size]
        if each is None:
            return "-"
        auc, tpr = each.auc, each.tpr
        mark = "*" if round(auc.value, 3) == best(task, size) else ""
        if not intervals:
            return f"{mark}{share(auc.value)} {tpr.value:4.0%}"
        bounds = f"[{share(auc.low)} {share(auc.high)}]"
        return (
            f"{mark}{share(auc.value)} {bounds:>11} {tpr.value:4.0%} {f'[{100 * tpr.low:.0f} {100 * tpr.high:.0f}]':>9}"
        )

    print(
        f"\nAUC, and TPR at an FPR of at most 1 %, {SHOWN} positions of one prompt; what ran (sdpa claimed, or as named)"
    )
    heads = [
        SHORT.get(ran, ran) + ("" if claimed == SDPA else f" as {SHORT[claimed]}") for claimed, ran in tasks(recorded)
    ]
    print(f"{'':<28}{'B/token':>8}{'s/prompt':>9}" + "".join(f"{head:>14}" for head in heads))
    for method in METHODS:
        shown = [cell(method, task, SHOWN, False) for task in tasks(recorded)]
        print(costs(recorded, method, SDPA) + "".join(f"{each:>14}" for each in shown))
    for claimed, ran in tasks(recorded):
        print(f"\n{ran} ran, {claimed} claimed: AUC [95 %] and TPR [95 %] at an FPR of at most 1 %")
        print(
            f"{'':<28}{'B/token':>8}{'s/prompt':>9}"
            + "".join(f"{f'{size} position' + 's' * (size > 1):>35}" for size in SIZES)
        )
        for method in METHODS:
            shown = [cell(method, (claimed, ran), size, True) for size in SIZES]
            print(costs(recorded, method, claimed) + "".join(f"{each:>35}" for each in shown))
    print_rules(recorded)
    print(NOTES)


def costs(recorded: Recorded, method: Method, claimed: str) -> str:
    return f"{method.name:<28}{method.bytes_per_token:>8.4g}{method.seconds(recorded, claimed):>9.1f}"


def share(value: float) -> str:
    return f"{value:.3f}".removeprefix("0") if value < 0.9995 else "1.00"


def print_rules(recorded: Recorded) -> None:
    """Where a rule has a threshold of its own: how often it rejects honest evidence, and each lie."""
    runs = [ran for claimed, ran in recorded.pairs if claimed == SDPA and ran != SDPA]
    print("\nRejected at each rule's own threshold, sdpa claimed")
    print(f"{'':<36}{'honest':>8}" + "".join(f"{SHORT.get(ran, ran):>14}" for ran in runs))
    for size in SIZES[1:]:
        for name, rejected in RULES.items():
            shares = [float(rejected(recorded, SDPA, ran, size).mean()) for ran in (SDPA, *runs)]
            shown = f"{f'{name}, {size} positions':<36}{shares[0]:>8.1%}"
            print(shown + "".join(f"{each:>14.1%}" for each in shares[1:]))


def batch_to_pool(recorded: Recorded) -> float:
    """The largest batch over the pool of positions that batches come from: at most 10 %, or they would be alike."""
    prompts = recorded.measured.shape[2]
    return max(SIZES) / (prompts * len(batches(1, POSITIONS)))
