"""A bundle's summary as text, for a terminal of any width; every string in it was checked to be printable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fpforensics.common.config import claim_of
from fpforensics.common.words import counted

if TYPE_CHECKING:
    from fpforensics.common.engines.base import ConcurrentWork
    from fpforensics.common.inspect import BundleSummary, RowSummary, SignalSummary

_LABEL = 13


def render_text(summary: BundleSummary) -> str:
    """The summary for people, what must not be overlooked first."""
    return "\n".join(_lines(summary))


def _lines(summary: BundleSummary) -> Iterator[str]:
    yield f"{summary.file}: {summary.format}, {_bytes(summary.file_bytes)}"
    yield from _signature(summary)
    yield _field("digest", summary.digest)
    yield _field("blobs", _blobs(summary))
    yield _field("manifest", _bytes(summary.manifest_bytes))
    yield _field("created", f"{summary.created_at} by fpforensics {summary.tool_version}")
    yield _field("session", summary.session_id)
    yield _field("nonce", summary.nonce or "none: nobody challenged this session")
    yield ""
    yield "Environment"
    environment = summary.environment
    yield _field("host", f"{environment.hostname}, {environment.platform}")
    yield _field("CPU", " ".join((f"{environment.cpu} x {environment.cpu_count}", *environment.cpu_flags)))
    yield _field("GPU", f"{', '.join(environment.gpus)}, driver {environment.driver}" if environment.gpus else "none")
    yield _field("Python", environment.python)
    yield _field("packages", _pairs(environment.packages))
    if environment.variables:
        yield _field("variables", _pairs(environment.variables))
    yield ""
    sampling = summary.sampling
    drawn = f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, seed {sampling.seed}"
    yield f"Sampling: up to {counted(sampling.max_new_tokens, 'token')}, {drawn if sampling.temperature else 'greedy'}"
    yield ""
    yield f"References ({len(summary.references)})"
    for reference in summary.references:
        prompt = counted(reference.prompt_tokens, "prompt token")
        yield _field(reference.id, f"{prompt}, {_generated(reference.output_tokens)}  {reference.source}")
    for row in summary.rows:
        yield ""
        yield f"Row {row.config_id}"
        yield from _row(row)


def _signature(summary: BundleSummary) -> Iterator[str]:
    signature = summary.signature
    if signature.state == "trusted":
        yield _field("signature", f"good, by trusted key {signature.keyid}")
        return
    yield (f"!! {signature.problem}" if signature.state == "not checked" else f"!! NOT TRUSTED: {signature.problem}")
    yield f"!! all below is what the file says of itself; it names key {signature.keyid}"


def _blobs(summary: BundleSummary) -> str:
    blobs = summary.blobs
    state = {
        None: "not read",
        True: "every digest fits",
        False: f"DAMAGED: {blobs.problem}",
    }[blobs.intact]
    return f"{blobs.count}, {_bytes(blobs.bytes)}; {state}"


def _row(row: RowSummary) -> Iterator[str]:
    facts, repetitions, model = row.facts, row.repetitions, row.facts.model
    widths = f"hidden {model.hidden_size}, keys {model.key_width}, vocabulary {model.vocab_size}"
    yield _field("config", str(claim_of(row.config)))
    yield _field("weights", model.weights_digest)
    yield _field("model", f"{model.architecture}, {counted(model.num_layers, 'layer')}, {widths}")
    yield _field("ran on", f"{facts.device} {facts.gpu}".rstrip())
    for phase, kernels in facts.attention_kernels.items():
        yield _field("attention", f"{phase}: {', '.join(kernels) or 'none seen'}")
    if facts.quantization_kernel:
        yield _field("quantization", facts.quantization_kernel)
    yield _field("batch sizes", ", ".join(map(str, facts.batch_sizes)))
    yield _field("numerics", _pairs(facts.numerics))
    yield _field("libraries", _pairs(facts.versions))
    equal = "bit-identical" if repetitions.bit_identical else f"DIFFERENT: {repetitions.first_divergence}"
    yield _field("repetitions", f"{repetitions.count}, {equal}")
    seconds = ", ".join(f"{wall:.2f}" for wall in repetitions.wall_seconds[:8])
    spread = f"mean {repetitions.wall_mean:.2f} s, variance {repetitions.wall_variance:.3g} s²"
    yield _field("wall time", f"{seconds} s ({spread})")
    if facts.concurrent_work:
        yield _field("beside it", _concurrent(facts.concurrent_work))
    for signal in row.signals:
        yield _field(signal.phase, _signal(signal))


def _concurrent(entries: Sequence[ConcurrentWork]) -> str:
    first = entries[0]
    overlaps = ", ".join(f"{each.overlap:.0%}" for each in entries[:8])
    where = "on a second stream" if first.kind == "cuda-stream" else f"in {counted(first.workers, 'thread')}"
    return f"products of {first.size}² in {first.dtype}, {where}; overlap {overlaps}"


def _signal(signal: SignalSummary) -> str:
    low, high = signal.positions
    count = counted(low, "position") if low == high else f"{low} to {high} positions"
    layers = f"layers {', '.join(signal.layers)}; " if signal.layers else ""
    return f"{signal.signal}: {layers}{count}; {', '.join(signal.dtypes)}"


def _generated(counts: Sequence[int]) -> str:
    """How many tokens the rows generated: one number where there is one row, else what all of them did, or the range."""
    low, high = min(counts, default=0), max(counts, default=0)
    if low != high:
        return f"{low} to {high} generated"
    return f"{low} generated{' each' * (len(counts) > 1)}"


def _field(label: str, value: str) -> str:
    return f"  {label:<{_LABEL}}{value}"


def _pairs(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "none"


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
