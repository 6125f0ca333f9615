"""What vLLM's evidence of a GPU measures against replays by transformers on a CPU.

    bench/vllm_cpu.py --model-path base=DIR --model-path awq=DIR --model-path gptq=DIR [-o FILE.npz]

Every bundle in ``tests/assets/hopper`` is replayed in prefill mode under every member. FILE.npz: ``distances`` (bundles, members,
references, cells, positions) float32, L2 at each position, prompt positions first; ``bundles``, ``members``, ``cells``, and
``prompt_positions``, how many of the positions are the prompt's. ``bench/vllm_tables.py`` prints the tables.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from small import save_small

from fpforensics.common.config import ExecutionConfig, parse_config
from fpforensics.common.engines import in_process
from fpforensics.common.engines.base import Host
from fpforensics.common.keys import Keyring
from fpforensics.common.signals import PHASES, CapturePlan, Trace
from fpforensics.verifier.distance import position_distances
from fpforensics.verifier.intake import open_bundle

FOLDER = Path(__file__).parents[1] / "tests" / "assets" / "hopper"
BUNDLES = ("fa3", "fa2", "triton", "graphs", "tp2", "awq_marlin", "gptq_marlin", "bnb-nf4", "gptq-fp16")
PRODUCTS = "matmul=fp32-rounded"
MEMBERS = {
    "base": f"model=base,{PRODUCTS}",
    "base, eager": f"model=base,attn=eager,{PRODUCTS}",
    "base, emulate_tp=2": f"model=base,emulate_tp=2,{PRODUCTS}",
    "base, fp16": f"model=base,dtype=fp16,{PRODUCTS}",
    "awq": f"model=awq,quant=awq,{PRODUCTS}",
    "gptq": f"model=gptq,quant=gptq,{PRODUCTS}",
    "gptq, fp16": f"model=gptq,quant=gptq,dtype=fp16,{PRODUCTS}",
    "nf4": "model=base,quant=bnb-nf4",
    "base, fp32": "model=base,dtype=fp32",
    "awq, fp32": "model=awq,quant=awq,dtype=fp32",
    "gptq, fp32": "model=gptq,quant=gptq,dtype=fp32",
    "nf4, fp32": "model=base,quant=bnb-nf4,dtype=fp32",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", action="append", default=[], metavar="NAME=FOLDER", required=True)
    parser.add_argument("-o", "--output", type=Path, default=FOLDER / "cpu.npz")
    arguments = parser.parse_args()
    host = Host(device="cpu", models=dict(pair.split("=", 1) for pair in arguments.model_path))
    keyring = Keyring.from_paths([FOLDER / "prover.key.pub"])
    with ExitStack() as stack:
        opened = [stack.enter_context(open_bundle(FOLDER / f"{name}.msgpack", keyring)) for name in BUNDLES]
        pairs = [(bundle, bundle.evidence.rows[0], each.id) for bundle in opened for each in bundle.references()]
        evidence = [bundle.trace(row, reference) for bundle, row, reference in pairs]
        forcings = [bundle.forcing(row, reference) for bundle, row, reference in pairs]
        capture = opened[0].evidence.capture
        prompt_positions = len(evidence[0].prefill.positions)
    found = {}
    cells: list[str] = []
    for name, spec in MEMBERS.items():
        started = time.perf_counter()
        with in_process(parse_config(spec, ExecutionConfig()), host, lambda: False) as engine:
            replays = engine.teacher_force(forcings, CapturePlan(layers=capture.layers), "prefill")
        measured = [distances(*pair) for pair in zip(evidence, replays, strict=True)]
        cells = list(measured[0])
        found[name] = np.array([list(each.values()) for each in measured], np.float32)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    stacked = np.stack(list(found.values()), axis=1)  # (bundles · references, members, cells, positions)
    shape = (len(BUNDLES), len(pairs) // len(BUNDLES), *stacked.shape[1:])
    save_small(
        arguments.output,
        distances=stacked.reshape(shape).transpose(0, 2, 1, 3, 4),
        bundles=np.array(BUNDLES),
        members=np.array(list(MEMBERS)),
        cells=np.array(cells),
        prompt_positions=np.array(prompt_positions),
    )


def distances(evidence: Trace, replay: Trace) -> dict[str, np.ndarray]:
    """(prompt and generated positions,) for each cell."""
    phases = [position_distances(evidence.phase(phase), replay.phase(phase)) for phase in PHASES]
    return {
        f"{key.signal}/{key.layer}".rstrip("/"): np.concatenate([phase[key] for phase in phases]) for key in phases[0]
    }


if __name__ == "__main__":
    main()
