"""Record cross-hardware evidence and its distances: the measurements that the decision rests on.

    bench/evidence.py record  --device cuda --key K -o FOLDER [--config SPEC …]     prover bundles, one per config
    bench/evidence.py replay  FOLDER --device cpu --key K.pub -o FILE.npz [--member SPEC …] [--early]

`record` runs the project's own prover: 24 references of the built-in corpus, 64 prompt positions and the decode
positions of a few generated tokens, for every config that runs on the device (the others are named with their reason).
With `--new-tokens 1` there are no decode positions; all rows of a prompt then share their replays, whatever their one token was.
`replay` teacher-forces every bundle's tokens under every member and stores, for each position and each cell (logprobs,
keys and hidden states by layer), the L2 distance from the evidence to the replay and from the replay to the float32
anchor; and, as controls, the distance to another prompt's replay and to a model whose weights were disturbed. With `--windows`
it stores means over windows of the positions of each phase, which is what `bench/fresh.py` judges.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fpforensics.common.config import ExecutionConfig, config_id, parse_config
from fpforensics.common.engines.base import Host, ReplayMode
from fpforensics.common.engines.remote import start_engine
from fpforensics.common.errors import Error
from fpforensics.common.keys import Keyring, load_private
from fpforensics.common.models import resolve_model
from fpforensics.common.signals import PHASES, CapturePlan, Forcing, Sampling, Trace
from fpforensics.prover.session import SessionPlan, run_session
from fpforensics.verifier.distance import SignalKey, position_distances
from fpforensics.verifier.intake import VerifiedBundle, open_bundle
from fpforensics.verifier.pooling import windows
from fpforensics.verifier.score import EARLY

CONFIGS = {
    "cuda": (
        "attn=sdpa",
        "attn=eager",
        "attn=sdpa_math",
        "attn=sdpa_flash",
        "attn=sdpa_efficient",
        "attn=sdpa_cudnn",
        "emulate_tp=2",
        "emulate_tp=4",
        "dtype=fp16",
        "quant=torchao-int8",
        "quant=torchao-int4",
        "quant=bnb-int8",
        "quant=bnb-nf4",
        "batch=2",
        "batch=4",
        "compile=true",
    ),
    "cpu": (
        "attn=sdpa",
        "attn=eager",
        "attn=sdpa_math",
        "emulate_tp=2",
        "emulate_tp=4",
        "dtype=fp16",
        "quant=torchao-int8",
        "quant=torchao-int4",
        "quant=bnb-nf4",
        "batch=2",
        "matmul=fp32-rounded",
        "compile=true",
    ),
}
MEMBERS = (
    "attn=sdpa",
    "attn=eager",
    "attn=sdpa_math",
    "emulate_tp=2",
    "emulate_tp=4",
    "dtype=fp16",
    "quant=torchao-int8",
    "quant=torchao-int4",
    "quant=bnb-int8",
    "quant=bnb-nf4",
    "matmul=fp32-rounded",
    "compile=true",
)
ANCHOR = "dtype=fp32"
DENSE = ("none", "awq", "gptq")
"""Quantizations whose products are plain ones in a replay: AWQ and GPTQ are dequantized at load."""
DISTURBED = "disturbed"
WRONG_PROMPT = "wrong-prompt"
CAPTURE = CapturePlan(prefill_positions=64)
COUNTS = (1, 3, 8, 16, 32, 64)
SHORT = (*EARLY, SignalKey("logprobs"))
# What a distance keeps of its mantissa, so that the files compress: a relative error of 2^-11.
_MANTISSA_BITS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("record", "replay"):
        command = commands.add_parser(name)
        command.add_argument("--device", choices=["cpu", "cuda"], required=True)
        command.add_argument("--key", type=Path, required=True)
        command.add_argument("-o", "--output", type=Path, required=True)
        command.add_argument("--env", action="append", default=[])
        command.add_argument("--seconds", type=float, default=1e9, help="start no further config after this time")
        if name == "record":
            command.add_argument("--config", action="append")
            command.add_argument("--references", type=int, default=24)
            command.add_argument("--prompt-tokens", type=int, default=192)
            command.add_argument("--new-tokens", type=int, default=9)
            command.add_argument("--repetitions", type=int, default=2)
            command.add_argument("--layers", default=",".join(CAPTURE.layers))
            command.add_argument("--documents", nargs="+", default=["builtin"])
        else:
            command.add_argument("folder", type=Path)
            command.add_argument("--member", action="append")
            command.add_argument(
                "--early",
                action="store_true",
                help="only prompt positions; the cells that decide and log-probabilities; no controls",
            )
            command.add_argument(
                "--windows", action="store_true", help="means over windows, by phase, in place of positions"
            )
            command.add_argument("--mode", choices=["prefill", "decode"], default="prefill")
            command.add_argument("--references", type=int, default=None, help="only the first ones")
            command.add_argument("--no-disturbed", action="store_true", help="without the control of disturbed weights")
            command.add_argument("--using", default="", help="matmul=fp32-rounded: how this verifier computes products")
            command.add_argument("--base", default="", help="what members are changes to, e.g. model=awq,quant=awq")
            command.add_argument("--model-path", action="append", default=[], metavar="NAME=FOLDER")
    arguments = parser.parse_args()
    host = Host(device=arguments.device, env=dict(each.split("=", 1) for each in arguments.env))
    if arguments.command == "record":
        record(arguments, host)
    else:
        replay(arguments, host)


def record(arguments: argparse.Namespace, host: Host) -> None:
    arguments.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for spec in arguments.config or CONFIGS[arguments.device]:
        if time.perf_counter() - started > arguments.seconds:
            say(f"{spec}: no time left")
            continue
        plan = SessionPlan(
            configs=(parse_config(spec),),
            documents=tuple(arguments.documents),
            references=arguments.references,
            prompt_tokens=arguments.prompt_tokens,
            capture=msgspec.structs.replace(CAPTURE, layers=tuple(arguments.layers.split(","))),
            layers_named=True,
            sampling=Sampling(max_new_tokens=arguments.new_tokens),
            repetitions=arguments.repetitions,
        )
        before = time.perf_counter()
        try:
            run_session(plan, host, load_private(arguments.key), arguments.output / f"{spec.replace('=', '-')}.msgpack")
            say(f"{spec}: {time.perf_counter() - before:.0f} s")
        except Error as error:
            say(f"{spec}: {error.diagnostics()}")


def replay(arguments: argparse.Namespace, host: Host) -> None:
    """Write arrays (rows, members, references, cells, positions): `evidence` and `noise`, and their names."""
    started = time.perf_counter()
    keyring = Keyring.from_paths([arguments.key])
    bundles = [open_bundle(path, keyring) for path in sorted(arguments.folder.glob("*.msgpack"))]
    count = arguments.references
    claimed = [claimed_traces(bundle)[:count] for bundle in bundles]
    members = [ANCHOR, *(arguments.member or MEMBERS)]
    base = parse_config(arguments.base)
    host = msgspec.structs.replace(host, models=dict(pair.split("=", 1) for pair in arguments.model_path))
    disturbed = Path(arguments.output).with_suffix(".model")
    if not (arguments.early or arguments.no_disturbed):
        disturb(resolve_model(ExecutionConfig().model).path, disturbed)
        host = msgspec.structs.replace(host, models={DISTURBED: str(disturbed)})
        members.append(f"model={DISTURBED}")
    using = parse_config(arguments.using).matmul
    measure = early_table if arguments.early else table
    anchors: list[list[Trace]] = []
    names: list[str] = []
    evidence: list[Any] = []
    noise: list[Any] = []
    for spec in members:
        if time.perf_counter() - started > arguments.seconds:
            say(f"{spec}: no time left")
            continue
        config = parse_config(spec, base)
        if using != "native" and config.dtype in ("bf16", "fp16") and config.quantization in DENSE:
            config = msgspec.structs.replace(config, matmul=using)
        before = time.perf_counter()
        try:
            traces = replayed(bundles, config, host, arguments.mode, count)
        except Error as error:
            say(f"{spec}: {error.diagnostics()}")
            continue
        anchors = anchors or traces
        names.append(config_id(parse_config(spec, base), base))
        evidence.append([measure(ours, theirs) for ours, theirs in zip(claimed, traces, strict=True)])
        noise.append([measure(ours, theirs) for ours, theirs in zip(traces, anchors, strict=True)])
        if spec == "attn=sdpa" and not arguments.early:
            names.append(WRONG_PROMPT)
            shifted = [[*each[1:], each[0]] for each in traces]
            evidence.append([measure(ours, theirs) for ours, theirs in zip(claimed, shifted, strict=True)])
            noise.append(noise[-1])
        keep(arguments, bundles, claimed, names, np.array(evidence), np.array(noise))
        say(f"{spec}: {time.perf_counter() - before:.0f} s")
    shutil.rmtree(disturbed, ignore_errors=True)
    say(f"{arguments.output}: {arguments.output.stat().st_size} bytes")


def keep(
    arguments: argparse.Namespace,
    bundles: Sequence[VerifiedBundle],
    claimed: Sequence[Sequence[Trace]],
    names: Sequence[str],
    evidence: Any,
    noise: Any,
) -> None:
    """Write what there is: after every member, so that an interrupted run leaves the earlier ones."""
    keys = SHORT if arguments.early else cell_keys(claimed[0][0])
    cells = [str(key.signal) + (f"/{key.layer}" if key.layer else "") for key in keys]
    found = {"evidence": evidence.swapaxes(0, 1), "noise": noise.swapaxes(0, 1)}
    if arguments.early:
        # Without decode positions the replays are the same for every row, but for the ids of log-probabilities: once is enough.
        found["noise"] = found["noise"][:1]
    if arguments.windows:
        found = {f"{phase}.{name}": means(values, phase) for name, values in found.items() for phase in PHASES}
    part = arguments.output.with_suffix(".part.npz")
    np.savez_compressed(
        part,
        rows=np.array([bundle.evidence.rows[0].config_id for bundle in bundles]),
        members=np.array(names),
        cells=np.array(cells),
        prefill=np.array(CAPTURE.prefill_positions),
        **{name: shortened(values) for name, values in found.items()},
    )
    part.replace(arguments.output)


def claimed_traces(bundle: VerifiedBundle) -> list[Trace]:
    row = bundle.evidence.rows[0]
    return [bundle.trace(row, reference.id) for reference in bundle.references()]


def replayed(
    bundles: Sequence[VerifiedBundle], config: ExecutionConfig, host: Host, mode: ReplayMode, count: int | None
) -> list[list[Trace]]:
    """Each bundle's tokens under one config, all in one worker; of the first ``count`` references.

    Configs often generate the same tokens: then one forward serves them all, and reports the ids that each asks for.
    """
    alike: dict[tuple[str, bytes], list[tuple[int, Forcing]]] = {}
    for index, bundle in enumerate(bundles):
        for reference in bundle.references()[:count]:
            forcing = bundle.forcing(bundle.evidence.rows[0], reference.id)
            fed = forcing.output_ids[:-1]  # the last token decides nothing
            alike.setdefault((reference.id, fed.tobytes()), []).append((index, forcing))
    merged = [
        replace(
            group[0][1],
            claimed_ids={phase: np.hstack([each.claimed_ids[phase] for _, each in group]) for phase in PHASES},
        )
        for group in alike.values()
    ]
    with start_engine(config, host) as engine:
        traces = engine.teacher_force(merged, bundles[0].evidence.capture, mode)
    found: list[dict[str, Trace]] = [{} for _ in bundles]
    for group, trace in zip(alike.values(), traces, strict=True):
        start = dict.fromkeys(PHASES, 0)
        for index, forcing in group:
            phases = {}
            for phase in PHASES:
                columns = slice(start[phase], start[phase] + forcing.claimed_ids[phase].shape[1])
                start[phase] = columns.stop
                whole = trace.phase(phase)
                ids, logprobs = whole.logprob_ids[:, columns], whole.logprobs[:, columns]
                phases[phase] = replace(whole, logprob_ids=ids, logprobs=logprobs)
            found[index][trace.reference_id] = replace(trace, prefill=phases["prefill"], decode=phases["decode"])
    return [[each[reference.id] for reference in bundles[0].references()[:count]] for each in found]


def cell_keys(trace: Trace) -> list[SignalKey]:
    return list(position_distances(trace.prefill, trace.prefill))


def table(claimed: Sequence[Trace], replay: Sequence[Trace]) -> Any:
    """(references, cells, positions): prefill first, then decode, NaN where a trace is shorter."""
    keys = cell_keys(claimed[0])
    longest = max(len(trace.prefill.positions) + len(trace.decode.positions) for trace in claimed)
    longest = max(longest, CAPTURE.prefill_positions + 8)
    found = np.full((len(claimed), len(keys), longest), np.nan, np.float32)
    for index, (ours, theirs) in enumerate(zip(claimed, replay, strict=True)):
        at = 0
        for phase in PHASES:
            one, other = ours.phase(phase), theirs.phase(phase)
            count = min(len(one.positions), len(other.positions))
            if not np.array_equal(one.logprob_ids, other.logprob_ids) or len(one.positions) != len(other.positions):
                # Another prompt: the vectors of the same rank from the end; log-probabilities say nothing.
                other = last_rows(other, one, count)
                one = last_rows(one, one, count)
            if count:
                distances = position_distances(one, other)
                for column, key in enumerate(keys):
                    found[index, column, at : at + count] = distances[key]
            at += len(ours.phase(phase).positions)
    return found


def early_table(claimed: Sequence[Trace], replay: Sequence[Trace]) -> Any:
    """(references, cells of SHORT, prompt positions)."""
    keys = cell_keys(claimed[0])
    return table(claimed, replay)[:, [keys.index(key) for key in SHORT], : CAPTURE.prefill_positions]


def windows_of(length: int) -> list[tuple[int, slice]]:
    """The windows that ``--windows`` keeps of so many positions, each with its number of positions."""
    return [(count, window) for count in COUNTS for window, _ in windows(count, length, most=2)]


def means(values: Any, phase: str) -> Any:
    """(rows, members, references, cells, windows) from (rows, members, references, cells, positions)."""
    at = CAPTURE.prefill_positions
    of_phase = values[..., :at] if phase == "prefill" else values[..., at:]
    found = [of_phase[..., window].mean(-1) for _, window in windows_of(of_phase.shape[-1])]
    return np.stack(found, -1) if found else np.empty((*values.shape[:-1], 0), np.float32)


def last_rows(trace: Any, like: Any, count: int) -> Any:
    """The last ``count`` rows of ``trace`` at the positions and ids of ``like``, log-probabilities zero."""
    from dataclasses import replace

    cut = slice(-count, None) if count else slice(0, 0)
    return replace(
        trace,
        positions=like.positions[cut],
        logprob_ids=like.logprob_ids[cut],
        logprobs=np.zeros_like(like.logprobs[cut]),
        hidden_states={layer: rows[cut] for layer, rows in trace.hidden_states.items()},
        key_vectors={layer: rows[cut] for layer, rows in trace.key_vectors.items()},
    )


def disturb(source: Path, target: Path) -> None:
    """A checkpoint of the same shape whose weights differ by one percent of their spread, as after a light fine-tune."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target, dirs_exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.ndim == 2:
                spread = tensor.float().std()
                noise = torch.randn(tensor.shape, generator=generator) * spread * 0.01
                tensors[name] = (tensor.float() + noise).to(tensor.dtype)
        save_file(tensors, path, metadata={"format": "pt"})


def shortened(values: Any) -> Any:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    drop = 23 - _MANTISSA_BITS
    return ((bits + (1 << (drop - 1))) >> drop << drop).astype(np.uint32).view(np.float32)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
