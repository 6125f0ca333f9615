"""What capture costs under vLLM: tokens per second with capture off, log-probabilities only, and all of the default plan.

    python bench/vllm_capture.py [--model smollm2-135m | --shape 1b] [--config compile=true,graphs=true] [--prompt 256] [--new 64]
        [--batch 1 32] [--repetitions 3] [--bare] [--profile]

One engine, in this process; ``--batch N`` runs N references together, all of them captured. The replay is a prefill replay of the same
tokens. ``--shape 1b`` takes random weights of the shape of Llama 3.2 1B. *off* is what costs are held against; *vLLM alone* picks its own
greedy tokens; *bare*, with ``--bare``, does so in a process of its own, without our operators in its graph, which are there whether
anything is captured or not.

Repetitions are interleaved, and each begins with another one of the things measured. Costs are the median of the repetitions' own
ratios, with its 95 % interval from order statistics (of 6 or more): of the *whole* job, and of its *steady* state, the steps after the
prompts, without what begins and ends a job.

Wall clocks on a shared host are noisy, and their noise only adds. So the same steps are also taken in windows of 16, and the lower
quartiles of all windows compared: *quiet*, with a 95 % interval from a bootstrap over the repetitions. And ``--profile`` counts: a GPU's
busy time and what is launched on it, from torch's profiler.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from machine import describe

from fpforensics.common.config import parse_config
from fpforensics.common.engines import vllm_compat as compat
from fpforensics.common.engines.base import Host
from fpforensics.common.engines.vllm_engine import VllmEngine
from fpforensics.common.engines.vllm_load import GPU_MEMORY_VARIABLE
from fpforensics.common.signals import PHASES, Array, CapturePlan, Forcing, Reference, Sampling

WINDOW = 16
BARE, ALONE, OFF, REPLAY = "bare", "vLLM alone", "off", "prefill replay"
PLANS: dict[str, CapturePlan | None] = {
    OFF: None,
    "logprobs": CapturePlan(layers=()),
    "five layers": CapturePlan(),
}


SHAPES = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--config", default="", help="e.g. compile=true,graphs=true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompt", type=int, default=256, help="prompt tokens")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--profile", action="store_true", help="also the GPU's busy time and launches in each token's step"
    )
    parser.add_argument("--bare", action="store_true", help="vLLM alone, nothing of ours in its graph")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.shape:
            write_random(options.shape, Path(folder))
        model = options.shape or options.model
        host = Host(device=options.device, models={options.shape: folder} if options.shape else {})
        spec = f"model={model},backend=vllm,batch=auto,{options.config}".rstrip(",")
        with bare_beside(spec, host) if options.bare else contextlib.nullcontext() as bare:
            engine = VllmEngine(parse_config(spec), host)
            try:
                print(describe(engine.config, torch.device(engine.facts().device)))
                for batch in options.batch:
                    measure(engine, batch, options, bare)
            finally:
                engine.close()


@contextlib.contextmanager
def bare_beside(spec: str, host: Host) -> Iterator[Connection]:
    """A process with vLLM and nothing of ours in its graph. It says what each :class:`Work` that it is sent took, in this one's turns."""
    os.environ.setdefault(GPU_MEMORY_VARIABLE, "2GiB")  # of each
    ours, its = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve_bare, args=(spec, host, its), daemon=True)
    process.start()
    its.close()
    try:
        yield ours
    finally:
        ours.send(None)
        process.join(60)
        process.kill()


class Work(NamedTuple):
    """What a bare vLLM is asked for. ``profiled``: the GPU's work instead of seconds."""

    batch: int
    prompt: int
    new: int
    profiled: bool = False


def serve_bare(spec: str, host: Host, asked: Connection) -> None:
    compat.graph_tokens = lambda vllm_config: None
    os.environ["VLLM_DISABLE_COMPILE_CACHE"] = "1"  # it would give back a graph with our operators
    config = parse_config(spec)
    if config.tensor_parallel * config.pipeline_parallel > 1:
        raise SystemExit("--bare: ranks are processes of their own, which load our operators")
    engine = VllmEngine(config, host)
    try:
        while (work := asked.recv()) is not None:
            references = prompts(engine, work.batch, work.prompt)
            run = lambda: run_alone(engine, references, work.new)  # noqa: B023, E731
            asked.send(counted(run) if work.profiled else timed(engine, run))
    finally:
        engine.close()


def write_random(shape: str, folder: Path) -> None:
    """A checkpoint of random weights in bf16, without a tokenizer: prompts are token ids."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=torch.bfloat16)
    model.save_pretrained(folder)


class Spent(NamedTuple):
    """Seconds of a job, of its steps after the prompts, and of these in windows (W,)."""

    whole: float
    steady: float
    windows: Array


def prompts(engine: VllmEngine, batch: int, length: int) -> list[Reference]:
    rng = np.random.default_rng(0)
    return [Reference(f"ref_{i}", rng.integers(0, engine.vocab_size, length).astype(np.int32)) for i in range(batch)]


def measure(engine: VllmEngine, batch: int, options: argparse.Namespace, bare: Connection | None) -> None:
    if options.profile and engine.facts().device != "cuda":
        raise SystemExit("--profile counts a GPU's work, and this runs on a CPU")
    references, sampling = prompts(engine, batch, options.prompt), Sampling(max_new_tokens=options.new)
    traces = engine.generate(references, sampling, CapturePlan())
    forcings = [
        Forcing(
            reference,
            trace.output_ids,
            {phase: trace.phase(phase).positions for phase in PHASES},
            {phase: trace.phase(phase).logprob_ids for phase in PHASES},
        )
        for reference, trace in zip(references, traces, strict=True)
    ]
    runs: dict[str, Callable[[], Any]] = {
        ALONE: lambda: run_alone(engine, references, options.new),
        **{name: lambda plan=plan: engine.generate(references, sampling, plan) for name, plan in PLANS.items()},  # type: ignore[misc]
        REPLAY: lambda: engine.teacher_force(forcings, CapturePlan(), "prefill"),
    }
    work = Work(batch, options.prompt, options.new)
    times: dict[str, Callable[[], Spent]] = {} if bare is None else {BARE: lambda: ask(bare, work)}
    times |= {name: lambda run=run: timed(engine, run) for name, run in runs.items()}  # type: ignore[misc]
    spent: dict[str, list[Spent]] = {name: [] for name in times}
    names = [*times]
    for repetition in range(options.repetitions + 1):  # the first warms up
        for name in names[repetition % len(names) :] + names[: repetition % len(names)]:
            taken = times[name]()
            if repetition:
                spent[name].append(taken)
    print(
        f"batch {batch}: {options.prompt} prompt and {options.new} new tokens each, {engine.facts().attention_kernels}"
    )
    report(spent, batch * options.new)
    if options.profile:
        found = {} if bare is None else {BARE: ask(bare, work._replace(profiled=True))}
        found |= {name: counted(run) for name, run in runs.items()}
        for name, (busy, launches) in found.items():
            steps = 1 if name == REPLAY else options.new
            print(
                f"  profile {name:16s} {busy / steps:10.1f} us busy, {launches / steps:8.1f} kernels and copies a step"
            )


def report(spent: dict[str, list[Spent]], tokens: int) -> None:
    """A line for each: tokens per second, what it costs against *off*, and the spread of its seconds."""
    wholes = {name: [each.whole for each in found] for name, found in spent.items()}
    for name, whole in wholes.items():
        spread = f"({min(whole):.3f} to {max(whole):.3f} s)"
        rate = f"  {name:16s} {tokens / statistics.median(whole):10.1f} tokens/s"
        if name == REPLAY:
            faster, least, most = paired(wholes[OFF], whole)
            print(f"{rate}  {faster:.1f} times as fast as generating ({least:.1f} to {most:.1f})  {spread}")
            continue
        if name == OFF:
            print(f"{rate}  {spread}")
            continue
        costs = {"whole": paired(whole, wholes[OFF])}
        costs["steady"] = paired([each.steady for each in spent[name]], [each.steady for each in spent[OFF]])
        costs["quiet"] = quiet([each.windows for each in spent[name]], [each.windows for each in spent[OFF]])
        text = ", ".join(
            "{} {:+.1f} % ({:+.1f} to {:+.1f})".format(what, *(100 * (ratio - 1) for ratio in ratios))
            for what, ratios in costs.items()
        )
        print(f"{rate}  {text}  {spread}")


def ask(bare: Connection, work: Work) -> Any:
    bare.send(work)
    return bare.recv()


def paired(ones: list[float], others: list[float]) -> tuple[float, float, float]:
    """The ratios of the same repetition's times: median, and the ends of its 95 % interval by order statistics; below six the extremes."""
    ratios = sorted(a / b for a, b in zip(ones, others, strict=True))
    count = len(ratios)
    outside = max((k for k in range(count // 2) if binomial_tail(k, count) <= 0.025), default=0)
    return statistics.median(ratios), ratios[outside], ratios[-1 - outside]


def quiet(ones: list[Array], others: list[Array]) -> tuple[float, float, float]:
    """The ratio of the windows' lower quartiles, and its 95 % interval from a bootstrap over repetitions."""
    pairs, rng = (np.stack(ones), np.stack(others)), np.random.default_rng(0)
    drawn = [np.arange(len(ones)), *rng.integers(0, len(ones), (2000, len(ones)))]
    ratios = [float(np.quantile(pairs[0][rows], 0.25) / np.quantile(pairs[1][rows], 0.25)) for rows in drawn]
    return ratios[0], float(np.quantile(ratios[1:], 0.025)), float(np.quantile(ratios[1:], 0.975))


def binomial_tail(successes: int, count: int) -> float:
    """The probability of at most so many of ``count`` tosses of a coin."""
    return sum(math.comb(count, k) for k in range(successes + 1)) / 2**count


def counted(run: Callable[[], Any]) -> tuple[float, int]:
    """Microseconds that the GPU was busy, and how many kernels and copies it ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
    found = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.time_range.elapsed_us() for event in found), len(found)


def run_alone(engine: VllmEngine, references: list[Reference], count: int) -> None:
    """Generate with vLLM's own sampler, as a provider would."""
    core: Any = engine._core
    for reference in references:
        prompt = compat.token_prompt(reference.prompt_ids.tolist())
        core.add_request(reference.id, prompt, compat.request_parameters(count))
    while core.has_unfinished_requests():
        core.step()


def timed(engine: VllmEngine, run: Callable[[], Any]) -> Spent:
    """The steady state begins when every request has its first token."""
    core: Any = engine._core
    step, ends = core.step, []

    def noted() -> Any:
        outputs = step()
        ends.append((time.perf_counter(), len(outputs)))
        return outputs

    core.step = noted
    try:
        started = time.perf_counter()
        run()
        whole = time.perf_counter() - started
    finally:
        core.step = step
    together = max(made for _, made in ends)
    steady = np.array([at for at, _ in ends][[made for _, made in ends].index(together) :])
    window = max(1, min(WINDOW, len(steady) - 1))
    return Spent(whole, float(steady[-1] - steady[0]), np.diff(steady[::window]))


if __name__ == "__main__":
    main()
