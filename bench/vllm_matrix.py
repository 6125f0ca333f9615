"""vLLM configs on one GPU: a signed bundle of each, the same tokens forced through all of them, and every bundle replayed by every config.

    bench/vllm_matrix.py --out DIR --model-path base=/models/x [--model-path awq=/models/x-awq ...]
        [--seconds 540] [--stage make|cross|all] [--references 4] [--prompt 512] [--new 64] [--tokens BUNDLE] SPEC [SPEC ...]

Each SPEC is a config as the prover takes it, e.g. ``model=base,attn=vllm_triton`` (``backend=vllm`` is implied; say
``backend=transformers`` for the other engine). Stage ``make`` starts each config once: the prover's session writes its bundle, then
the first config's tokens, or those of ``--tokens``' bundle, are forced through it in both modes. Stage ``cross`` starts each again and
replays every bundle in DIR.
With ``--compact`` each config also leaves a bundle that is small enough to keep, with ``--wide`` one of many prompts. A config that fails is reported and left out. What is left when the time is over is named in ``results.json``.

DIR/results.json: facts, seconds, failures, kernel classes by mode. DIR/distances.npz: ``shared/{mode}/{cell}`` and
``cross/{mode}/{cell}`` (C, C) float64, rows claimed, columns verified, NaN where nothing ran; ``names`` (C,).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
from small import save_small

from fpforensics.common.config import ExecutionConfig, config_id, parse_config
from fpforensics.common.engines.base import Engine, Host, ReplayMode
from fpforensics.common.engines.remote import start_engine
from fpforensics.common.errors import Error
from fpforensics.common.keys import Keyring, PrivateKey
from fpforensics.common.signals import PHASES, CapturePlan, Forcing, Sampling, Trace
from fpforensics.prover.session import SessionPlan, run_session
from fpforensics.verifier.distance import trace_distances
from fpforensics.verifier.intake import open_bundle
from fpforensics.verifier.replay import fingerprint

KEY = PrivateKey.from_seed(b"vllm on one gpu, nobody's secret")
MODES: tuple[ReplayMode, ...] = ("decode", "prefill")


class Driver:
    """The configs in order, what ran of them, and when to stop."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, Path(options.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.end = time.monotonic() + options.seconds
        base = parse_config("backend=vllm")
        self.configs = [parse_config(spec, base) for spec in options.specs]
        self.names = [config_id(config, base) for config in self.configs]
        self.host = Host(
            models=dict(pair.split("=", 1) for pair in options.model_path), env={"FPFORENSICS_DEBUG": options.debug}
        )
        self.plan = CapturePlan(layers=tuple(options.layers.split(",")), prefill_positions=options.positions)
        self.results: dict[str, dict[str, object]] = {name: {} for name in self.names}
        self.matrices: dict[str, np.ndarray] = {}
        self.forcings: list[Forcing] | None = None
        if options.tokens:
            with open_bundle(options.tokens, Keyring([KEY.public])) as bundle:
                self.forcings = [bundle.forcing(bundle.evidence.rows[0], each.id) for each in bundle.references()]
        self.shared: dict[ReplayMode, dict[str, list[Trace]]] = {mode: {} for mode in MODES}

    def bundle(self, name: str, kind: str = "bundle") -> Path:
        return self.folder / f"{kind}{self.names.index(name):02d}.msgpack"

    def each(self, stage: str, work: Callable[[str, ExecutionConfig, Engine], None]) -> None:
        """Run ``work`` in each config's own worker; failures are written down."""
        for name, config in zip(self.names, self.configs, strict=True):
            report = self.results[name]
            left = self.end - time.monotonic()
            if left < self.options.least:
                report[f"{stage}_failed"] = f"not started: {left:.0f} s left"
                continue
            started = time.monotonic()
            try:
                with start_engine(config, self.host, lambda: time.monotonic() > self.end) as engine:
                    report[f"{stage}_start_seconds"] = round(time.monotonic() - started, 1)
                    try:
                        work(name, config, engine)
                    finally:
                        report["facts"] = msgspec.to_builtins(engine.facts())
            except Error as error:
                report.setdefault(f"{stage}_failed", error.diagnostics())
            report[f"{stage}_seconds"] = round(time.monotonic() - started, 1)
            print(f"{stage} {name}: {report[f'{stage}_seconds']} s {report.get(f'{stage}_failed', 'ok')}", flush=True)
            self.write()

    def make(self, name: str, config: ExecutionConfig, engine: Engine) -> None:
        """A bundle by the prover's own session, then the same tokens through each config in both modes."""

        @contextlib.contextmanager
        def running(*_: object) -> Iterator[Engine]:
            yield engine

        options = self.options
        plan = SessionPlan(
            configs=(config,),
            references=options.references,
            prompt_tokens=options.prompt,
            capture=self.plan,
            sampling=Sampling(max_new_tokens=options.new),
            repetitions=2,
            allow_nondeterminism=True,
        )
        run_session(plan, self.host, KEY, self.bundle(name), start=running)
        if options.compact:
            small = msgspec.structs.replace(
                plan,
                references=2,
                prompt_tokens=min(options.prompt, 192),
                capture=CapturePlan(layers=("1", "2", "4"), prefill_positions=8, top_k=5),
                layers_named=True,
                sampling=Sampling(max_new_tokens=5),
            )
            run_session(small, self.host, KEY, self.bundle(name, "compact"), start=running)
        if options.wide:
            wide = msgspec.structs.replace(
                plan,
                references=options.wide,
                prompt_tokens=64,
                capture=CapturePlan(layers=("1", "2", "4"), prefill_positions=64, top_k=5),
                layers_named=True,
                sampling=Sampling(max_new_tokens=1),
                repetitions=1,
            )
            run_session(wide, self.host, KEY, self.bundle(name, "wide"), start=running)
        with open_bundle(self.bundle(name), Keyring([KEY.public])) as bundle:
            (row,) = bundle.evidence.rows
            repetitions = row.repetitions
            self.results[name]["bit_identical"] = repetitions.bit_identical
            self.results[name]["first_divergence"] = repetitions.first_divergence
            self.results[name]["generate_seconds"] = [round(seconds, 2) for seconds in repetitions.wall_seconds]
            own = [bundle.forcing(row, reference.id) for reference in bundle.references()]
            if self.forcings is None:
                self.forcings = own
            traces = [bundle.trace(row, reference.id) for reference in bundle.references()]
            again = engine.teacher_force(own, self.plan, "decode")
            self.results[name]["decode_replay_identical"] = fingerprint(traces) == fingerprint(again)
        for mode in MODES:
            started = time.monotonic()
            found = engine.teacher_force(self.forcings, self.plan, mode)
            self.results[name][f"{mode}_seconds"] = round(time.monotonic() - started, 2)
            self.results[name][f"{mode}_fingerprint"] = fingerprint(found)
            self.shared[mode][name] = found
        for mode in MODES:
            for other, theirs in self.shared["decode"].items():
                self.put("shared", mode, other, name, theirs, self.shared[mode][name])
                if other != name:
                    self.put("shared", mode, name, other, self.shared["decode"][name], self.shared[mode][other])

    def cross(self, name: str, _config: ExecutionConfig, engine: Engine) -> None:
        """Every bundle in the folder, forced through this config."""
        for claimed in self.names:
            if not self.bundle(claimed).exists():
                continue
            with open_bundle(self.bundle(claimed), Keyring([KEY.public])) as bundle:
                (row,) = bundle.evidence.rows
                ids = [reference.id for reference in bundle.references()]
                forcings = [bundle.forcing(row, each) for each in ids]
                evidence = [bundle.trace(row, each) for each in ids]
                for mode in MODES:
                    self.put("cross", mode, claimed, name, evidence, engine.teacher_force(forcings, self.plan, mode))

    def put(self, kind: str, mode: str, claimed: str, verified: str, ours: list[Trace], theirs: list[Trace]) -> None:
        """One entry of the matrices: mean over references of the mean L2 over positions, for each cell."""
        found = [trace_distances(a, b) for a, b in zip(ours, theirs, strict=True)]
        at = self.names.index(claimed), self.names.index(verified)
        for cell in sorted(set.intersection(*(set(each) for each in found))):
            key = f"{kind}/{mode}/{cell.phase}-{cell.signal}-{cell.layer or 'all'}"
            matrix = self.matrices.setdefault(key, np.full((len(self.names), len(self.names)), np.nan))
            matrix[at] = float(np.mean([each[cell] for each in found]))

    def classes(self, mode: ReplayMode) -> list[list[str]]:
        """Configs whose traces of the same tokens are equal in every bit."""
        alike: dict[object, list[str]] = {}
        for name in self.shared[mode]:
            alike.setdefault(self.results[name].get(f"{mode}_fingerprint"), []).append(name)
        return list(alike.values())

    def write(self) -> None:
        """What is known up to now."""
        summary = {"configs": self.results, "classes": {mode: self.classes(mode) for mode in MODES}}
        (self.folder / "results.json").write_text(json.dumps(summary, indent=1))
        save_small(self.folder / "distances.npz", names=np.array(self.names), **self.matrices)


def show(driver: Driver) -> None:
    """Two lines a config, and the matrices that tell most."""
    for number, name in enumerate(driver.names):
        report = driver.results[name]
        failed = report.get("make_failed") or report.get("cross_failed") or ""
        print(
            f"[{number}] {name}: identical {report.get('bit_identical')}, decode replay {report.get('decode_replay_identical')} {failed}"
        )
    for mode in MODES:
        print(f"classes ({mode}):", [[driver.names.index(name) for name in names] for names in driver.classes(mode)])
    for key, matrix in driver.matrices.items():
        if key.endswith(("key_vectors-2", "hidden_states-1", "logprobs-all")) and any(phase in key for phase in PHASES):
            print(key)
            print(np.array2string(matrix, precision=4, suppress_small=True, max_line_width=200))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="+", metavar="SPEC")
    parser.add_argument("--out", required=True)
    parser.add_argument("--model-path", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--seconds", type=float, default=540, help="stop starting and running after so long")
    parser.add_argument("--least", type=float, default=20, help="start no config with fewer seconds left")
    parser.add_argument("--stage", choices=("make", "cross", "all"), default="all")
    parser.add_argument("--references", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--positions", type=int, default=16, help="prompt positions to capture")
    parser.add_argument("--layers", default="1,2,4,12,last")
    parser.add_argument(
        "--tokens",
        type=Path,
        metavar="BUNDLE",
        help="force this bundle's tokens, at its positions, not the first config's",
    )
    parser.add_argument("--debug", default="0")
    parser.add_argument(
        "--compact", action="store_true", help="also a bundle of few positions and layers, small enough to keep"
    )
    parser.add_argument(
        "--wide",
        type=int,
        default=0,
        metavar="N",
        help="also a bundle of N short prompts, for bench/evidence.py replay",
    )
    options = parser.parse_args()
    if options.tokens and options.stage == "cross":
        parser.error("--tokens: stage cross forces each bundle's own tokens")
    driver = Driver(options)
    if driver.options.stage != "cross":
        driver.each("make", driver.make)
    if driver.options.stage != "make":
        driver.each("cross", driver.cross)
    driver.write()
    show(driver)


if __name__ == "__main__":
    main()
