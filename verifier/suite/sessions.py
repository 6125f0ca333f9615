"""One prover session: asked for, fetched, checked on arrival, kept under its name."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from fpforensics.common.access import Access
from fpforensics.common.cache import write_atomically
from fpforensics.common.config import DEFAULT_MODEL, ExecutionConfig
from fpforensics.common.engines.base import ConcurrentWork, Engine, EngineStarter, Host
from fpforensics.common.engines.preflight import has_interpreter, lacks_device
from fpforensics.common.engines.remote import start_engine
from fpforensics.common.errors import EvidenceError, MissingDependencyError, ReplayError, UsageError, shorten
from fpforensics.common.keys import Keyring
from fpforensics.common.models import resolve_model
from fpforensics.prover.client import ProverClient, require_known_signer
from fpforensics.prover.session import SessionPlan, SessionProgress, run_session
from fpforensics.verifier.answer import require_as_asked
from fpforensics.verifier.fresh import require_prompts
from fpforensics.verifier.intake import VerifiedBundle, open_bundle
from fpforensics.verifier.suite.folder import Folder
from fpforensics.verifier.suite.model import LOCAL, ProverSpec, Suite, Variant
from fpforensics.verifier.suite.plan import Job, session_plan
from fpforensics.verifier.suite.stop import Stop

Report = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a run needs beside its suite. ``models`` maps names to checkpoints, for local provers and replays."""

    folder: Folder
    suite: Suite
    models: dict[str, str] = field(default_factory=dict)
    access: Access | None = None
    start: EngineStarter = start_engine
    stop: Stop = field(default_factory=Stop)

    def session_host(self, prover: ProverSpec, variant: Variant) -> Host:
        """Where a local prover's worker runs ``variant``. Raises what keeps this host from it."""
        host = Host(device=prover.device, python=variant.python, env=variant.env, models=self.models)
        require_interpreter(host)
        if why := lacks_device(host):
            raise ReplayError(why, f'write device = "auto" or "cpu" for [[prover]] {prover.name} in the suite\'s file')
        return host

    def replay_host(self, variant: Variant) -> Host:
        """Where a replay of ``variant`` runs. Raises what keeps this host from it."""
        host = Host(device=self.suite.replay.device, python=variant.python, env=variant.env, models=self.models)
        require_interpreter(host)
        if why := lacks_device(host):
            raise ReplayError(
                why,
                "before a run: --device cpu; after it: verifier suite replay FOLDER, with --device cpu or where there is a GPU",
            )
        return host


def require_interpreter(host: Host) -> None:
    """Raise :class:`UsageError` for one that is not there: a suite's file names it, and no option."""
    if not has_interpreter(host):
        raise UsageError(
            f"python = {shorten(host.python)!r}: no such interpreter",
            "name one with fpforensics installed in the suite's file, which `verifier suite show NAME --toml` prints of a built-in one",
        )


class Loads:
    """Starts engines, and notes how many and how long they took to load, or to refuse."""

    def __init__(self, start: EngineStarter) -> None:
        self._start = start
        self.count, self.seconds = 0, 0.0

    @contextmanager
    def __call__(self, config: ExecutionConfig, host: Host, cancelled: Callable[[], bool]) -> Iterator[Engine]:
        """Load ``config``, as any starter does."""
        started = time.perf_counter()
        self.count += 1
        with ExitStack() as stack:
            try:
                engine = stack.enter_context(self._start(config, host, cancelled))
            finally:
                self.seconds += time.perf_counter() - started
            yield engine


@dataclass(frozen=True)
class Held:
    """A session's bundle, checked: its name, how long each repetition took, whether they were bit-identical, and what ran
    beside them."""

    digest: str
    wall_seconds: tuple[float, ...]
    identical: bool
    concurrent_work: tuple[ConcurrentWork, ...] = ()


def new_nonce() -> str:
    """A challenge."""
    return secrets.token_hex(32)


def fetch(setting: Setting, job: Job, session: str, nonce: str, report: Report, keyring: Keyring) -> Held:
    """Run a session and keep its bundle as ``session``, whole and checked or not at all.

    Raises what the prover or this host raises, and :class:`EvidenceError` for a bundle that is not to be trusted.
    """
    plan = session_plan(setting.suite, job.variant, nonce)
    incoming = setting.folder.incoming / f"{session}.msgpack"
    try:
        obtain(setting, job, plan, incoming, report, keyring)
        held = check(setting, job, incoming, plan, keyring)
        setting.folder.accept(incoming, session)
        return held
    finally:
        incoming.unlink(missing_ok=True)


def obtain(setting: Setting, job: Job, plan: SessionPlan, incoming: Path, report: Report, keyring: Keyring) -> None:
    """Have the job's prover run ``plan``, its bundle in ``incoming``: not checked yet."""
    if job.prover.endpoint == LOCAL:
        _run_here(setting, job, plan, incoming, report)
    else:
        _run_there(setting, job.prover, plan, incoming, report, keyring)


def adopt(setting: Setting, job: Job, session: str, nonce: str, keyring: Keyring) -> Held | None:
    """What a killed run had stored but not noted: the bundle that answers ``nonce``; None if there is none."""
    path = setting.folder.bundle(session)
    if not nonce or not path.exists():
        return None
    try:
        return check(setting, job, path, session_plan(setting.suite, job.variant, nonce), keyring)
    except EvidenceError:
        return None


def check(setting: Setting, job: Job, path: Path, plan: SessionPlan, keyring: Keyring) -> Held:
    """Check a bundle from its signature to its prompts. Raises :class:`EvidenceError`."""
    with setting.folder.lock, open_bundle(path, keyring, expected_nonce=plan.nonce) as bundle:
        bundle.verify_all()
        require_as_asked(bundle, plan)
        _require_prompts(setting, bundle, plan)
        _require_same_prompts(setting, bundle, plan)
        row = bundle.evidence.rows[0]
        repetitions, work = row.repetitions, tuple(row.facts.concurrent_work)
        return Held(bundle.digest, repetitions.wall_seconds, repetitions.bit_identical, work)


def _run_here(setting: Setting, job: Job, plan: SessionPlan, incoming: Path, report: Report) -> None:
    def progress(now: SessionProgress) -> None:
        report(now.stage, now.done, now.total)

    host = setting.session_host(job.prover, job.variant)
    key = setting.folder.private_key()
    run_session(plan, host, key, incoming, progress, setting.stop, setting.start)


def _run_there(
    setting: Setting, prover: ProverSpec, plan: SessionPlan, incoming: Path, report: Report, keyring: Keyring
) -> None:
    with ProverClient(prover.endpoint, setting.access) as client, setting.stop.closing(client.close):
        require_known_signer(client.describe(), keyring, prover.endpoint)
        client.run_session(plan, incoming, report=report)


def _require_prompts(setting: Setting, bundle: VerifiedBundle, plan: SessionPlan) -> None:
    """Compare with the prompts that were asked for, where this side holds the tokenizer: nothing is fetched for it."""
    model = plan.configs[0].model
    if model != DEFAULT_MODEL and model not in setting.models:
        return
    try:
        require_prompts(bundle, plan, resolve_model(model, models=setting.models).path)
    except MissingDependencyError:
        return


def _require_same_prompts(setting: Setting, bundle: VerifiedBundle, plan: SessionPlan) -> None:
    """One suite has one set of prompts: where ours cannot be made here, the first bundle's are what the others must show."""
    known = setting.folder.path / "prompts.json"
    ours = [(entry.id, entry.prompt_ids.sha256) for entry in bundle.evidence.references]
    if not known.exists():
        write_atomically(known, msgspec.json.encode(ours))
        return
    first = msgspec.json.decode(known.read_bytes(), type=list[tuple[str, str]])
    if ours != first:
        raise EvidenceError(
            f"the prompts of {plan.configs[0].model} are not those of the suite's first session",
            "configs are compared on the same tokens: use models that share a tokenizer, and provers of one version",
        )
