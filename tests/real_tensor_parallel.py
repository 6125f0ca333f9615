"""One forward of a checkpoint under transformers' own tensor parallelism, by several processes on this machine.

This file is also the program that those processes run; the first of them writes what it found.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig


def states_in_processes(count: int, checkpoint: Path, output: Path) -> list[Any]:
    """Hidden states before each block and after the last, and logits, (1, T, ...) each; written to ``output``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [*command, __file__, str(checkpoint), str(output)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    states: list[Any] = torch.load(output)
    return states


def whole(tensor: Any) -> Any:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def main(checkpoint: str, output: str) -> None:
    torch.distributed.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=torch.bfloat16,
        use_safetensors=True,
        distributed_config=DistributedConfig(tp_size=torch.distributed.get_world_size()),
    ).eval()
    with torch.inference_mode():
        found = model(torch.arange(24)[None] * 7 % 512, output_hidden_states=True)
    states = [whole(state) for state in (*found.hidden_states, found.logits)]
    if torch.distributed.get_rank() == 0:
        torch.save(states, output)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
