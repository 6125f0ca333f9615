"""Suite files: TOML to a checked :class:`Suite`. See docs/suite.md."""

from __future__ import annotations

import re
import tomllib
from importlib import resources
from pathlib import Path
from typing import get_args

import msgspec

from fpforensics.common.config import KEYS, ExecutionConfig, config_id, parse_config
from fpforensics.common.engines.base import ReplayMode
from fpforensics.common.errors import UsageError, did_you_mean, shorten
from fpforensics.common.signals import CapturePlan
from fpforensics.common.strict import Limits
from fpforensics.verifier.check import run_as
from fpforensics.verifier.suite.model import (
    LOCAL,
    Comparison,
    Experiment,
    ProverSpec,
    References,
    ReplaySettings,
    Suite,
    Variant,
)
from fpforensics.verifier.suite.table import Table

BUILTIN = ("megaplan", "megaplan-smollm2", "tensor-parallel", "quantization", "attention")
REFERENCE = "reference"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
_VARIANT = re.compile(r"[A-Za-z0-9][\w.=-]{0,63}", re.ASCII)
_MAX_BYTES = 1 << 20


def find_suite(name: str) -> Suite:
    """A built-in suite by its name, or the one in a ``.toml`` file."""
    if name.endswith(".toml"):
        return read_suite(Path(name))
    if name not in BUILTIN:
        raise UsageError(f"unknown suite {shorten(name)!r}", f"{did_you_mean(name, BUILTIN)} or give a .toml file")
    return parse_suite(builtin_text(name), name)


def builtin_text(name: str) -> str:
    """The TOML of a built-in suite."""
    return resources.files(__package__).joinpath(f"{name}.toml").read_text(encoding="utf-8")


def read_suite(path: Path) -> Suite:
    """Read a suite file. Raises :class:`UsageError` naming file, table, key, value and the way out."""
    try:
        raw = path.read_bytes()
        if len(raw) > _MAX_BYTES:
            raise UsageError(f"suite {path} has {len(raw)} bytes", f"at most {_MAX_BYTES}")
        text = raw.decode()
    except FileNotFoundError:
        raise UsageError(f"no suite file {path}", f"give a .toml file, or one of {', '.join(BUILTIN)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"suite {path} is not readable: {error}", "see docs/suite.md") from None
    return parse_suite(text, path.name)


def parse_suite(text: str, file: str) -> Suite:
    """The same from the file's text."""
    try:
        top = Table(tomllib.loads(text), file)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"suite {file} is not TOML: {error}", "see docs/suite.md") from None
    base = top.table("baseline")
    baseline = msgspec.structs.replace(_variant(base, ExecutionConfig()), name="baseline")
    base.close()
    capture = top.table("capture")
    suite = Suite(
        name=_named(top, _NAME),
        title=top.text("title", ""),
        baseline=baseline,
        references=_references(top.table("references")),
        layers_named=capture.has("layers"),
        capture=_capture(capture),
        repetitions=top.number("repetitions", 3, 1, 20),
        provers=tuple(_prover(each) for each in top.tables("prover")) or (ProverSpec(),),
        replay=_replay(top.table("replay")),
        compare=_compare(top.table("compare")),
        experiments=tuple(_experiment(each, baseline) for each in top.tables("experiment")),
    )
    top.close()
    _require_once(file, "prover", [each.name for each in suite.provers])
    _require_once(file, "experiment", [REFERENCE, *(each.name for each in suite.experiments)])
    if not suite.experiments:
        raise UsageError(f"suite {file} has no experiments", "write [[experiment]] with name, variable and values")
    return suite


def _experiment(table: Table, common: Variant) -> Experiment:
    name = _named(table, _NAME)
    variable = table.text("variable")
    skip = table.text("skip", "")
    reload, nondeterministic = table.flag("reload", False), table.flag("nondeterministic", False)
    baseline = common
    if table.has("baseline"):
        # Another baseline, told apart by what it is: two experiments that name the same one share it.
        config = _config(table, "baseline", common.config)
        baseline = msgspec.structs.replace(common, config=config, name=_slug(config_id(config, common.config)))
    field = KEYS.get(variable, "")
    if field:
        baseline = msgspec.structs.replace(baseline, value=getattr(baseline.config, field))
    variants: list[Variant] = []
    if table.has("values"):
        for spec in table.texts("values", ()):
            config = _parse(table, "values", spec, baseline.config)
            value = getattr(config, field) if field else spec
            variants.append(Variant(config=config, name=_slug(spec), value=value))
    for given in table.tables("variant"):
        variant = _variant(given, baseline.config)
        given.close()
        if variant.value == "":
            variant = msgspec.structs.replace(variant, value=getattr(variant.config, field) if field else variant.name)
        variants.append(variant)
    table.close()
    variants = [msgspec.structs.replace(each, reload=reload, nondeterministic=nondeterministic) for each in variants]
    if not variants and not skip:
        raise table.error("values", None, 'config specs, e.g. ["batch=2", "batch=4"], or [[experiment.variant]] tables')
    _require_once(table.file, f"variant of {name}", [each.name for each in variants])
    for each in variants:
        if each.identity == baseline.identity:
            raise UsageError(
                f"suite {table.file}: [{table.where}]: {each.name!r} is the baseline itself",
                "the baseline is always there",
            )
    return Experiment(name=name, variable=variable, baseline=baseline, variants=tuple(variants), skip=skip)


def _variant(table: Table, base: ExecutionConfig) -> Variant:
    config = _config(table, "config", base) if table.has("config") else base
    name = table.text("name", "") or _slug(table.text("config", ""))
    if name and not _VARIANT.fullmatch(name):
        raise table.error("name", name, "letters, digits, '.', '=', '-' and '_', at most 64")
    if table.where != "baseline" and not name:
        raise table.error("name", name, "a short name, or a config")
    return Variant(
        config=config,
        name=name,
        value=table.scalar("value", ""),
        env=table.mapping("env"),
        python=table.text("python", ""),
    )


def _config(table: Table, key: str, base: ExecutionConfig) -> ExecutionConfig:
    return _parse(table, key, table.text(key), base)


def _parse(table: Table, key: str, spec: str, base: ExecutionConfig) -> ExecutionConfig:
    try:
        return parse_config(spec, base)
    except UsageError as error:
        raise table.refused(key, spec, error) from None


def _slug(spec: str) -> str:
    """A config spec as a file name: the model by its last part, no commas."""
    parts = [part.strip() for part in spec.split(",") if part.strip()]
    short = [
        f"model={part.rpartition('/')[2]}" if part.startswith("model=") and "/" in part else part for part in parts
    ]
    return re.sub(r"[^\w.=-]", "_", "_".join(short))[:64]


def _references(table: Table) -> References:
    defaults = References()
    found = References(
        count=table.number("count", defaults.count, 1, 256),
        prompt_tokens=table.number("prompt_tokens", defaults.prompt_tokens, 1, 32_768),
        new_tokens=table.number("new_tokens", defaults.new_tokens, 1, 8192),
        documents=table.texts("documents", defaults.documents),
        instruction=table.text("instruction", defaults.instruction),
    )
    table.close()
    return found


def _capture(table: Table) -> CapturePlan:
    defaults = CapturePlan(prefill_positions=3, top_k=10)
    layers, deepest = table.texts("layers", defaults.layers), Limits().layers
    for layer in layers:
        if layer != "last" and not (re.fullmatch(r"[1-9][0-9]{0,3}", layer) and int(layer) <= deepest):
            wanted = f'block numbers from 1 to {deepest} as strings, e.g. "4", or "last"'
            raise table.error("layers", layer, wanted)
    if len(set(layers)) < len(layers):
        raise table.error("layers", layers, "each layer once")
    found = CapturePlan(
        layers=layers,
        prefill_positions=table.number("prefill_positions", defaults.prefill_positions, 0, 32_768),
        decode_positions=table.number("decode_positions", 0, 0, 8192),
        top_k=table.number("top_k", defaults.top_k, 1, 1024),
    )
    table.close()
    return found


def _prover(table: Table) -> ProverSpec:
    endpoint = table.text("endpoint", LOCAL)
    if endpoint != LOCAL:
        from fpforensics.common.access import split_address

        try:
            split_address(endpoint)
        except UsageError as error:
            raise table.refused("endpoint", endpoint, error) from None
    name = table.text("name", LOCAL)
    if not _NAME.fullmatch(name):
        raise table.error("name", name, "lower-case letters, digits, '-' and '_'")
    found = ProverSpec(
        name=name,
        endpoint=endpoint,
        device=table.choice("device", "auto", ("auto", "cpu", "cuda")),
        labels=table.mapping("labels"),
    )
    table.close()
    return found


def _replay(table: Table) -> ReplaySettings:
    using = table.text("using", "")
    try:
        run_as(ExecutionConfig(), using)
    except UsageError as error:
        raise table.refused("using", using, error) from None
    mode: ReplayMode = "prefill" if table.choice("mode", "decode", get_args(ReplayMode)) == "prefill" else "decode"
    found = ReplaySettings(
        enabled=table.flag("enabled", True),
        mode=mode,
        using=using,
        device=table.choice("device", "auto", ("auto", "cpu", "cuda")),
    )
    table.close()
    return found


def _compare(table: Table) -> Comparison:
    found = Comparison(
        canonical=table.choice("canonical", "claimed", ("claimed", "first")), top=table.number("top", 10, 1, 1024)
    )
    table.close()
    return found


def _named(table: Table, pattern: re.Pattern[str]) -> str:
    name = table.text("name")
    if not pattern.fullmatch(name):
        raise table.error("name", name, "lower-case letters, digits, '-' and '_', at most 40")
    return name


def _require_once(file: str, what: str, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"suite {file}: {what} {name!r} is given twice", "give each its own name")
