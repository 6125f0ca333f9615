"""A calibration as text: what was measured where, whether it can reject anything, and honest distances by cell."""

from __future__ import annotations

from collections.abc import Iterator

from fpforensics.common.words import counted
from fpforensics.verifier.coverage import enough_prompts, too_few
from fpforensics.verifier.lanes import ALPHA, LANES
from fpforensics.verifier.measured import QUANTILES, Measured, MeasuredProfile
from fpforensics.verifier.profile import Pool, Profile, built_in_digest
from fpforensics.verifier.report import clean

_LABEL = 15


def render_measured(profile: MeasuredProfile, *, brief: bool = False) -> str:
    """A profile of one's own; ``brief`` leaves out the table of cells."""
    return "\n".join(_measured(profile, brief))


def render_built_in(profile: Profile) -> str:
    """The built-in profile."""
    return "\n".join(_built_in(profile))


def _measured(profile: MeasuredProfile, brief: bool) -> Iterator[str]:
    content = profile.content
    yield clean(
        f"{content.name}: {counted(len(content.measured), 'calibration')}, {content.created_at}, fpforensics {content.tool_version}"
    )
    yield _field("digest", profile.digest)
    yield _field("signed by", profile.signer.keyid)
    yield from (_field("bundle", f"sha256:{digest}") for digest in profile.bundles)
    for each in content.measured:
        yield ""
        yield from _entry(each)
        if not brief:
            yield from _cells(each)


def _entry(each: Measured) -> Iterator[str]:
    scope = each.scope
    yield clean(scope.label)
    yield _field("model", f"{scope.config.model}, weights {scope.config.weights_digest}")
    yield _field("prover", scope.prover.hardware)
    yield _field("verifier", f"{scope.verifier.hardware}; replays by {scope.mode}, products {scope.matmul}")
    low, high = each.prompt_tokens
    lengths = counted(low, "token") if low == high else f"{low} to {high} tokens"
    yield _field("prompts", f"{each.prompts}, of {lengths}; {each.decode_share:.0%} of the positions generated ones")
    yield _field("rivals", ", ".join(each.rivals) or "none: the lineup lane cannot reject")
    if each.rivals:
        yield _field(
            "nearest", f"in {each.nearest} of {counted(each.prompts, 'prompt')} the own config is, over all positions"
        )
        if 2 * each.nearest < each.prompts:
            yield "  !! another config lies nearer in most prompts: was this really run as declared?"
    yield from _pools(each.pools)
    said = too_few(each.prompts)
    if said:
        yield f"  !! {said}"


def _pools(pools: tuple[Pool, ...]) -> Iterator[str]:
    yield f"  {'positions':>10}{'prompts':>9}{'noise floors: median':>22}{'largest':>9}{'least noise':>13}{'least margin':>14}"
    for pool in pools:
        middle, margin = pool.floors[len(pool.floors) // 2], f"{pool.margin[0]:.3f}" if pool.margin else "none"
        yield (
            f"  {pool.positions:>10}{pool.prompts:>9}{middle:>22.3f}{pool.floors[-1]:>9.3f}{pool.noise[0]:>13.3f}{margin:>14}"
        )


def _cells(each: Measured) -> Iterator[str]:
    side = max([4, *(len(str(cell.cell)) for cell in each.cells)])
    yield "  Honest distance in noise floors, prompt by prompt:"
    heads = "".join(f"{_quantile(quantile):>8}" for quantile in QUANTILES)
    yield f"  {'cell':<{side}}{'floor (L2)':>12}{heads}"
    for cell in each.cells:
        values = "".join(f"{value:>8.3f}" for value in cell.quantiles)
        yield f"  {cell.cell!s:<{side}}{cell.floor:>12.3g}{values}"


def _built_in(profile: Profile) -> Iterator[str]:
    yield f"{profile.name}: built in, {profile.created_at}"
    yield _field("digest", built_in_digest())
    yield _field("model", f"{profile.model}, weights {profile.weights}; used for every model")
    for prover, verifier in zip(profile.prover, profile.verifier, strict=True):
        yield _field("measured", f"{prover} replayed on {verifier}; used for all hardware")
    yield _field("dtypes", ", ".join(profile.dtypes))
    yield _field("attention", ", ".join(profile.attentions))
    yield _field("quantization", ", ".join(profile.quantizations))
    yield from _pools(profile.pools)
    yield f"  {counted(enough_prompts(), 'prompt')} are needed to reject at α = {ALPHA:g} in one of {LANES} lanes"


def _quantile(share: float) -> str:
    return {0.0: "least", 0.5: "median", 1.0: "most"}.get(share, f"{share:.0%}")


def _field(label: str, value: str) -> str:
    return f"  {label:<{_LABEL}}{clean(value)}"
