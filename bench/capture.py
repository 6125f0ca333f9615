"""What capture costs: generation with and without it, and a prefill replay beside a plain forward pass.

    python bench/capture.py [--model smollm2-135m] [--prompt 256] [--new 32] [--repetitions 5] [--config attn=eager]

Medians over interleaved repetitions. Goals: capture on generation at most 5 %, prefill replay at most 1.15 of the forward.
The forward beside the replay keeps logits of the last row only, which is the cheapest that a forward can be.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from machine import describe

from fpforensics.common.config import parse_config
from fpforensics.common.engines.transformers_load import (
    check_config,
    choose_device,
    compute_dtype,
    load_model,
    prepare_imports,
)
from fpforensics.common.models import resolve_model
from fpforensics.common.signals import PHASES, CapturePlan, Forcing, Reference, Sampling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--config", default="", help="e.g. attn=eager,matmul=fp32-rounded")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompt", type=int, default=256, help="prompt tokens")
    parser.add_argument("--new", type=int, default=32, help="new tokens")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()

    config = parse_config(f"model={options.model},{options.config}")
    check_config(config)
    checkpoint = resolve_model(config.model)
    prepare_imports()
    import torch

    from fpforensics.common.engines.transformers_loop import Runner
    from fpforensics.common.engines.transformers_matmul import round_products
    from fpforensics.common.engines.transformers_tensor_parallel import split_products

    device = choose_device(options.device, config)
    model = load_model(config, checkpoint.path, device)
    if config.emulate_tensor_parallel > 1:
        split_products(model, config.emulate_tensor_parallel)
    if config.matmul == "fp32-rounded":
        round_products(model, compute_dtype(config))
    runner = Runner(model, config, device)

    ids = np.random.default_rng(0).integers(0, runner.vocab_size, options.prompt).astype(np.int32)
    reference, sampling, plan = Reference("ref_0", ids), Sampling(max_new_tokens=options.new), CapturePlan()
    trace = runner.generate(reference, sampling, plan)
    forcing = Forcing(
        reference,
        trace.output_ids,
        {phase: trace.phase(phase).positions for phase in PHASES},
        {phase: trace.phase(phase).logprob_ids for phase in PHASES},
    )
    fed = torch.from_numpy(np.concatenate([ids, trace.output_ids[:-1]]).astype(np.int64))[None].to(device)

    def forward(keep: int) -> Callable[[], object]:
        def run() -> object:
            with torch.inference_mode():
                return model(input_ids=fed, use_cache=True, logits_to_keep=keep)

        return run

    runs: dict[str, Callable[[], object]] = {
        "generate, nothing captured": lambda: runner.generate(reference, sampling, None),
        "generate, captured": lambda: runner.generate(reference, sampling, plan),
        "forward, last row's logits": forward(1),
        "forward, all logits": forward(0),
        "prefill replay": lambda: runner.force_at_once(forcing, plan),
    }
    seconds = interleaved(runs, options.repetitions, torch.cuda.synchronize if device.type == "cuda" else lambda: None)
    against = dict(zip(runs, ["", "generate, nothing captured", "", "", "forward, last row's logits"], strict=True))

    print(describe(config, device))
    print(
        f"{options.prompt} prompt tokens, {options.new} new tokens, layers {', '.join(plan.layers)}, "
        f"top {plan.top_k}, {options.repetitions} interleaved repetitions"
    )
    print(f"\n| {'run':<27} | median s | ratio | goal |\n| {'-' * 27} | -------: | ----: | ---: |")
    goals = {"generate, captured": "1.05", "prefill replay": "1.15"}
    for name, median in seconds.items():
        ratio = f"{median / seconds[against[name]]:.3f}" if against[name] else ""
        print(f"| {name:<27} | {median:>8.3f} | {ratio:>5} | {goals.get(name, ''):>4} |")


def interleaved(
    runs: dict[str, Callable[[], object]], repetitions: int, synchronize: Callable[[], None]
) -> dict[str, float]:
    """Median seconds of each run; one round of warming up, then all runs in turn, so that drift hits them alike."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if repetition:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


if __name__ == "__main__":
    main()
