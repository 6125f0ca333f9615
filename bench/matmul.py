"""``matmul=native`` beside ``matmul=fp32-rounded``: speed of prefill and decode, and how many product outputs differ.

    python bench/matmul.py [--model smollm2-135m] [--dtype bf16] [--prompt 256] [--new 16] [--repetitions 3]

Each product of the native model is computed again from its own input in float32 and rounded; the share counts outputs whose
bits differ.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from capture import interleaved
from machine import describe

from fpforensics.common.config import parse_config
from fpforensics.common.engines.transformers_load import choose_device, compute_dtype, load_model, prepare_imports
from fpforensics.common.models import resolve_model
from fpforensics.common.signals import Reference, Sampling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompt", type=int, default=256, help="prompt tokens")
    parser.add_argument("--new", type=int, default=16, help="new tokens")
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()

    config = parse_config(f"model={options.model},dtype={options.dtype}")
    checkpoint = resolve_model(config.model)
    prepare_imports()
    import torch

    from fpforensics.common.engines.transformers_loop import Runner
    from fpforensics.common.engines.transformers_matmul import round_products

    device = choose_device(options.device, config)
    native = load_model(config, checkpoint.path, device)
    rounded = load_model(config, checkpoint.path, device)
    round_products(rounded, compute_dtype(config))
    runners = {"native": Runner(native, config, device), "fp32-rounded": Runner(rounded, config, device)}

    vocab = runners["native"].vocab_size
    reference = Reference("ref_0", np.random.default_rng(0).integers(0, vocab, options.prompt).astype(np.int32))
    differing, outputs = compare_products(native, reference, compute_dtype(config), device)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = interleaved(
        {
            f"{name} {count}": lambda runner=runner, count=count: runner.generate(  # type: ignore[misc]
                reference, Sampling(max_new_tokens=count), None
            )
            for name, runner in runners.items()
            for count in (1, 1 + options.new)
        },
        options.repetitions,
        synchronize,
    )

    print(describe(config, device))
    print(f"{options.prompt} prompt tokens, {options.new} new tokens, {options.repetitions} interleaved repetitions\n")
    print("| matmul       | prefill tokens/s | decode tokens/s | outputs that differ from native |")
    print("| ------------ | ---------------: | --------------: | ------------------------------: |")
    for name in runners:
        prefill = seconds[f"{name} 1"]
        decode = seconds[f"{name} {1 + options.new}"] - prefill
        share = f"{differing / outputs:.2e} of {outputs:.1e}" if name != "native" else ""
        print(f"| {name:<12} | {options.prompt / prefill:>16.1f} | {options.new / decode:>15.1f} | {share:>31} |")


def compare_products(model: Any, reference: Reference, dtype: Any, device: Any) -> tuple[int, int]:
    """(outputs whose bits differ, outputs) over every linear layer in one forward over the prompt."""
    import torch

    from fpforensics.common.engines.transformers_matmul import RoundedLinear

    counted = [0, 0]

    def again(module: Any, inputs: Any, output: Any) -> None:
        counted[0] += int((RoundedLinear(module, dtype)(inputs[0]) != output).sum())
        counted[1] += output.numel()

    handles = [m.register_forward_hook(again) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    with torch.inference_mode():
        model(torch.from_numpy(reference.prompt_ids.astype(np.int64))[None].to(device))
    for handle in handles:
        handle.remove()
    return counted[0], counted[1]


if __name__ == "__main__":
    main()
