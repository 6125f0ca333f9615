"""What capture costs under vLLM: tokens per second with capture off, log-probabilities only, and all of the default plan.

    python bench/vllm_capture.py [--model smollm2-135m | --shape 1b] [--config compile=true,graphs=true] [--prompt 256] [--new 64]
        [--batch 1 32] [--repetitions 3] [--bare] [--profile]

One engine, in this process; ``--batch N`` runs N references together, all of them captured. The replay is a prefill replay of the same
tokens. ``--shape 1b`` takes random weights of the shape of Llama 3.2 1B. *off* is what costs are held against; *vLLM alone* picks its own
greedy tokens; *bare*, with ``--bare``, does so in a process of its own, without our operators in its graph, which are there whether
anything is captured or not.

Repetitions are interleaved, each in an order of its own. What a thing costs is the median of the repetitions' own ratios, with its 95 %
interval from order statistics (of 6 or more; of fewer, the extremes). The noise of a shared host mostly adds, so the lower quartiles of
the jobs' seconds are compared too: *quiet*, with a 95 % interval from a bootstrap over the repetitions. Both are of *whole* jobs, and
of their *steady* state: what comes after the first token of the last request, the end of the job included, when rows come to the host.

Wall clocks are noisy; ``--profile`` counts: a GPU's busy time and what is launched on it, from torch's profiler.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import os
import random
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
from fpforensics.common.signals import PHASES, CapturePlan, Forcing, Reference, Sampling

_ENOUGH = 6
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
        "--only", nargs="+", choices=[ALONE, *PLANS, REPLAY], help="these, and what they are held against"
    )
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
        config = parse_config(spec)
        if options.bare and config.tensor_parallel * config.pipeline_parallel > 1:
            raise SystemExit("--bare: ranks are processes of their own, which load our operators")
        with bare_beside(spec, host) if options.bare else contextlib.nullcontext() as bare:
            engine = VllmEngine(config, host)
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
        with contextlib.suppress(OSError):
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
    with tempfile.TemporaryDirectory() as cache:
        os.environ["VLLM_CACHE_ROOT"] = cache  # the usual one would give back a graph with our operators
        engine = VllmEngine(parse_config(spec), host)
        try:
            serve(engine, asked)
        finally:
            engine.close()


def serve(engine: VllmEngine, asked: Connection) -> None:
    while (work := asked.recv()) is not None:
        references = prompts(engine, work.batch, work.prompt)
        run = lambda: run_alone(engine, references, work.new)  # noqa: B023, E731
        asked.send(counted(run) if work.profiled else timed(engine, run))


def write_random(shape: str, folder: Path) -> None:
    """A checkpoint of random weights in bf16, without a tokenizer: prompts are token ids."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # seconds, not a minute
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()


class Spent(NamedTuple):
    """Seconds of a job, and of its steady state."""

    whole: float
    steady: float


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
    runs = {name: run for name, run in runs.items() if not options.only or name in (OFF, *options.only)}
    work = Work(batch, options.prompt, options.new)
    times: dict[str, Callable[[], Spent]] = {} if bare is None else {BARE: lambda: ask(bare, work)}
    times |= {name: lambda run=run: timed(engine, run) for name, run in runs.items()}  # type: ignore[misc]
    spent: dict[str, list[Spent]] = {name: [] for name in times}
    shuffled = random.Random(0)
    for repetition in range(options.repetitions + 1):  # the first warms up
        for name in shuffled.sample([*times], len(times)):
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
    """A line for each: tokens per second and the spread of its seconds; and what it costs against *off* and *bare*."""
    for name, found in spent.items():
        seconds = [each.whole for each in found]
        spread = f"({min(seconds):.3f} to {max(seconds):.3f} s)"
        print(f"  {name:16s} {tokens / statistics.median(seconds):10.1f} tokens/s  {spread}")
        if name == REPLAY:
            ratios = paired([each.whole for each in spent[OFF]], seconds)
            print("    {:.1f} times as fast as generating ({:.1f} to {:.1f})".format(*ratios))
            continue
        for other in (OFF, BARE):
            if other in spent and name not in (other, BARE):
                for what in Spent._fields:
                    pair = ([getattr(each, what) for each in spent[one]] for one in (name, other))
                    print(f"    {what:6s} against {other}: {cost(*pair)}")


def cost(ones: list[float], others: list[float]) -> str:
    ratios = {"median": paired(ones, others)}
    if len(ones) >= _ENOUGH:
        ratios["quiet"] = quiet(ones, others)
    return ", ".join(
        "{} {:+.1f} % ({:+.1f} to {:+.1f})".format(what, *(100 * (each - 1) for each in found))
        for what, found in ratios.items()
    )


def ask(bare: Connection, work: Work) -> Any:
    try:
        bare.send(work)
        return bare.recv()
    except (EOFError, OSError):
        raise SystemExit("--bare: its process ended; what it wrote says why") from None


def paired(ones: list[float], others: list[float]) -> tuple[float, float, float]:
    """The ratios of the same repetition's times: median, and the ends of its 95 % interval by order statistics; below six the extremes."""
    ratios = sorted(a / b for a, b in zip(ones, others, strict=True))
    count = len(ratios)  # below _ENOUGH none are outside
    outside = max((k for k in range(count // 2) if binomial_tail(k, count) <= 0.025), default=0)
    return statistics.median(ratios), ratios[outside], ratios[-1 - outside]


def quiet(ones: list[float], others: list[float]) -> tuple[float, float, float]:
    """The ratio of the lower quartiles, and its 95 % interval from a bootstrap over repetitions."""
    pairs, rng = np.array([ones, others]), np.random.default_rng(0)
    quartiles = np.quantile(pairs[:, rng.integers(0, len(ones), (5000, len(ones)))], 0.25, axis=2)
    least, most = np.quantile(quartiles[0] / quartiles[1], [0.025, 0.975])
    one, other = np.quantile(pairs, 0.25, axis=1)
    return float(one / other), float(least), float(most)


def binomial_tail(successes: int, count: int) -> float:
    """The probability of at most so many of ``count`` tosses of a coin."""
    return sum(math.comb(count, k) for k in range(successes + 1)) / 2**count


def counted(run: Callable[[], Any]) -> tuple[float, int]:
    """Microseconds that the GPU was busy, and how many kernels and copies it ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
    found = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy = until = 0.0
    for begin, end in found:  # kernels of two streams may overlap
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return busy, len(found)


def run_alone(engine: VllmEngine, references: list[Reference], count: int) -> None:
    """Generate with vLLM's own sampler, as a provider would."""
    core: Any = engine._core
    for reference in references:
        prompt = compat.token_prompt(reference.prompt_ids.tolist())
        core.add_request(reference.id, prompt, compat.request_parameters(count))
    while core.has_unfinished_requests():
        core.step()


def timed(engine: VllmEngine, run: Callable[[], Any]) -> Spent:
    core: Any = engine._core
    step, ends = core.step, []

    def noted() -> Any:
        outputs = step()
        ends.append((len(outputs), time.perf_counter()))
        return outputs

    core.step = noted
    try:
        started = time.perf_counter()
        run()
        ended = time.perf_counter()
    finally:
        core.step = step
    together = max(requests for requests, _ in ends)  # as many as ever have a token
    return Spent(ended - started, ended - next(at for requests, at in ends if requests == together))


if __name__ == "__main__":
    main()
