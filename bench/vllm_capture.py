"""What capture costs under vLLM: tokens per second of vLLM alone, with capture off, log-probabilities only, and all of the default plan.

    python bench/vllm_capture.py [--model smollm2-135m | --shape 1b] [--config compile=true,graphs=true] [--prompt 256] [--new 64]
        [--batch 1 32] [--repetitions 3] [--bare] [--profile]

One engine for each batch size, in this process. Repetitions are interleaved, and each begins with another one of the things measured.
``--batch N`` above 1 runs N references together (``batch=auto``), all of them captured. The replay is a prefill replay of the same
tokens. ``--shape 1b`` takes random weights of the shape of Llama 3.2 1B. *vLLM alone* picks its own greedy tokens; *off* is what costs are held against: the
median of the repetitions' own ratios, with its 95 % interval from order statistics (of 6 or more). With ``--bare`` nothing but vLLM alone
runs, and under CUDA graphs without our operators in the model's graph, which are in it whether anything is captured or not.

Wall clocks on a shared host are noisy; ``--profile`` counts: a GPU's busy time and what is launched on it, from torch's profiler.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe

from fpforensics.common.config import parse_config
from fpforensics.common.engines import vllm_compat as compat
from fpforensics.common.engines.base import Host
from fpforensics.common.engines.vllm_engine import VllmEngine
from fpforensics.common.signals import PHASES, CapturePlan, Forcing, Reference, Sampling

ALONE = "vLLM alone"
PLANS: dict[str, CapturePlan | None] = {
    "off": None,
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
        for batch in options.batch:
            spec = f"model={model},backend=vllm,batch={'1' if batch == 1 else 'auto'},{options.config}"
            engine = opened(spec.rstrip(","), host, options.bare)
            try:
                print(describe(engine.config, torch.device(engine.facts().device)))
                measure(engine, batch, options)
            finally:
                engine.close()


def opened(spec: str, host: Host, bare: bool) -> VllmEngine:
    """The engine; ``bare`` leaves our operators out of the model's graph, and takes no graph compiled with them."""
    config = parse_config(spec)
    if bare:
        if config.tensor_parallel * config.pipeline_parallel > 1:
            raise SystemExit("--bare: ranks are processes of their own, which load our operators")
        compat.graph_tokens = lambda vllm_config: None
        os.environ["VLLM_DISABLE_COMPILE_CACHE"] = "1"
    return VllmEngine(config, host)


def write_random(shape: str, folder: Path) -> None:
    """A checkpoint of random weights in bf16, without a tokenizer: prompts are token ids."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def measure(engine: VllmEngine, batch: int, options: argparse.Namespace) -> None:
    if options.profile and engine.facts().device != "cuda":
        raise SystemExit("--profile counts a GPU's work, and this runs on a CPU")
    rng = np.random.default_rng(0)
    references = [
        Reference(f"ref_{i}", rng.integers(0, engine.vocab_size, options.prompt).astype(np.int32)) for i in range(batch)
    ]
    sampling = Sampling(max_new_tokens=options.new)
    runs: dict[str, Callable[[], Any]] = {ALONE: lambda: run_alone(engine, references, options.new)}
    if not options.bare:
        runs |= {
            name: lambda plan=plan: engine.generate(references, sampling, plan)  # type: ignore[misc]
            for name, plan in PLANS.items()
        }
        runs["replay"] = lambda: engine.teacher_force(forcings, CapturePlan(), "prefill")
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
    seconds: dict[str, list[float]] = {name: [] for name in [ALONE, *PLANS, "replay"]}
    for repetition in range(options.repetitions + 1):  # the first warms up
        names = [*runs][repetition % len(runs) :] + [*runs][: repetition % len(runs)]
        for name in names:
            spent = timed(runs[name])
            if repetition:
                seconds[name].append(spent)
    tokens, off = batch * options.new, seconds[ALONE if options.bare else "off"]
    print(
        f"batch {batch}: {options.prompt} prompt and {options.new} new tokens each, {engine.facts().attention_kernels or 'bare'}"
    )
    for name in (ALONE, *PLANS):
        if spent := seconds[name]:
            cost, least, most = (100 * (ratio - 1) for ratio in paired(spent, off))
            print(
                f"  {name:20s} {tokens / statistics.median(spent):10.1f} tokens/s  {cost:+6.1f} % ({least:+.1f} to {most:+.1f})"
                f"  ({min(spent):.3f} to {max(spent):.3f} s)"
            )
    if spent := seconds["replay"]:
        faster, least, most = paired(off, spent)
        print(
            f"  prefill replay       {tokens / statistics.median(spent):10.1f} tokens/s  {faster:6.1f} times as fast as generating"
            f" ({least:.0f} to {most:.0f})  ({min(spent):.3f} to {max(spent):.3f} s)"
        )
    if options.profile:
        profile({name: run for name, run in runs.items() if name != "replay"}, options.new)


def paired(ones: list[float], others: list[float]) -> tuple[float, float, float]:
    """The ratios of the same repetition's times: median, and the ends of its 95 % interval by order statistics; below six the extremes."""
    ratios = sorted(a / b for a, b in zip(ones, others, strict=True))
    count = len(ratios)
    outside = max((k for k in range(count // 2) if binomial_tail(k, count) <= 0.025), default=0)
    return statistics.median(ratios), ratios[outside], ratios[-1 - outside]


def binomial_tail(successes: int, count: int) -> float:
    """The probability of at most so many of ``count`` tosses of a coin."""
    return sum(math.comb(count, k) for k in range(successes + 1)) / 2**count


def profile(runs: dict[str, Callable[[], Any]], tokens: int) -> None:
    """The GPU's busy time and launches a step, prompts included: a step is one token of each reference."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for name, run in runs.items():
        with torch.profiler.profile(activities=activities) as profiler:
            run()
        found = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        busy = sum(event.time_range.elapsed_us() for event in found)
        print(
            f"  profile {name:20s} {busy / tokens:8.1f} us busy, {len(found) / tokens:7.1f} kernels and copies a step"
        )


def run_alone(engine: VllmEngine, references: list[Reference], count: int) -> None:
    """Generate with vLLM's own sampler, as a provider would."""
    core: Any = engine._core
    for reference in references:
        prompt = compat.token_prompt(reference.prompt_ids.tolist())
        core.add_request(reference.id, prompt, compat.request_parameters(count))
    while core.has_unfinished_requests():
        core.step()


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
