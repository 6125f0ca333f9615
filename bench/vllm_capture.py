"""What capture costs under vLLM: tokens per second of vLLM alone, with capture off, log-probabilities only, and all of the default plan.

    python bench/vllm_capture.py [--model smollm2-135m | --shape 1b] [--config compile=true,graphs=true] [--prompt 256] [--new 64]
        [--batch 1 32] [--repetitions 3] [--bare]

One engine for each batch size, in this process; medians over interleaved repetitions. ``--batch N`` above 1 runs N
references together (``batch=auto``), all of them captured. The replay is a prefill replay of the same tokens. ``--shape 1b``
takes random weights of the shape of Llama 3.2 1B. *vLLM alone* picks its own greedy tokens; *off* is what costs are held against: the
median of the repetitions' own ratios. With ``--bare`` nothing but vLLM alone runs, and under CUDA graphs without our operators in the
model's graph, which are in it whether anything is captured or not.
"""

from __future__ import annotations

import argparse
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
    rng = np.random.default_rng(0)
    references = [
        Reference(f"ref_{i}", rng.integers(0, engine.vocab_size, options.prompt).astype(np.int32)) for i in range(batch)
    ]
    sampling = Sampling(max_new_tokens=options.new)
    seconds: dict[str, list[float]] = {name: [] for name in [ALONE, *PLANS, "replay"]}
    forcings: list[Forcing] = []
    for repetition in range(options.repetitions + 1):  # the first warms up
        _, spent = timed(lambda: run_alone(engine, references, options.new))
        if repetition:
            seconds[ALONE].append(spent)
        if options.bare:
            continue
        for name, plan in PLANS.items():
            traces, spent = timed(lambda plan=plan: engine.generate(references, sampling, plan))
            if repetition:
                seconds[name].append(spent)
        forcings = [
            Forcing(
                reference,
                trace.output_ids,
                {phase: trace.phase(phase).positions for phase in PHASES},
                {phase: trace.phase(phase).logprob_ids for phase in PHASES},
            )
            for reference, trace in zip(references, traces, strict=True)
        ]
        _, spent = timed(lambda forcings=forcings: engine.teacher_force(forcings, CapturePlan(), "prefill"))
        if repetition:
            seconds["replay"].append(spent)
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


def paired(ones: list[float], others: list[float]) -> tuple[float, float, float]:
    """The ratios of the same repetition's times: median, and the middle half's ends."""
    ratios = sorted(a / b for a, b in zip(ones, others, strict=True))
    lower, median, upper = np.percentile(ratios, [25, 50, 75])
    return float(median), float(lower), float(upper)


def run_alone(engine: VllmEngine, references: list[Reference], count: int) -> None:
    """Generate with vLLM's own sampler, as a provider would."""
    core: Any = engine._core
    for reference in references:
        prompt = compat.token_prompt(reference.prompt_ids.tolist())
        core.add_request(reference.id, prompt, compat.request_parameters(count))
    while core.has_unfinished_requests():
        core.step()


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


if __name__ == "__main__":
    main()
