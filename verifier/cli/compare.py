"""``verifier compare``: how far the full logits of two bundles lie apart; no model, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import click

from fpforensics.common.cli import progress_bar, quiet_option
from fpforensics.common.errors import EvidenceError, shorten

_BUNDLE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("a", type=_BUNDLE)
@click.argument("b", type=_BUNDLE)
@click.option("--key", "keys", multiple=True, required=True, type=click.Path(path_type=Path), help="Trusted public key, or a folder of *.pub. Repeatable.")  # fmt: skip
@click.option("--row-a", default="", metavar="ID", help="Config id of the row of A. [default: its only row]")
@click.option("--row-b", default="", metavar="ID", help="Config id of the row of B. [default: its only row]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@quiet_option
def compare(a: Path, b: Path, keys: tuple[Path, ...], row_a: str, row_b: str, as_json: bool, quiet: bool) -> None:
    """Compare the full logits of bundle A, the baseline, with those of B, position by position.

    Both were made from the same prompts with prover run --full-logits; they may be one file with two rows. Prints
    differences of logits, errors of log-probabilities, divergences and top-k agreement; gives no verdict.

    \b
    verifier compare tp1.msgpack tp4.msgpack --key prover.key.pub
    verifier compare rows.msgpack rows.msgpack --key prover.key.pub --row-a attn=sdpa --row-b attn=eager
    """
    import msgspec

    from fpforensics.common.keys import Keyring
    from fpforensics.verifier.compare.bundles import compare_pair
    from fpforensics.verifier.compare.pairing import choose_side, pair_rows, require_logits
    from fpforensics.verifier.intake import open_bundle
    from fpforensics.verifier.report import compare_text

    keyring = Keyring.from_paths(keys)
    with ExitStack() as stack:
        bundles = []
        for path in (a, b):
            with _named(path):
                bundles.append(stack.enter_context(open_bundle(path, keyring)))
        for name, bundle in zip("AB", bundles, strict=True):
            require_logits(name, bundle)
        pair = pair_rows(choose_side("A", bundles[0], row_a), choose_side("B", bundles[1], row_b))
        report = stack.enter_context(progress_bar(quiet))
        for side in (pair.a, pair.b):
            with _named(side.bundle.path):
                side.bundle.verify_all(partial(report, f"checking digests of {side.name}"))
        result = compare_pair(pair, report)
    click.echo(msgspec.json.format(msgspec.json.encode(result)) if as_json else compare_text.render(result))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Of two bundles, an error must say which one it is about."""
    name = f"bundle {shorten(path.name)}"
    try:
        yield
    except EvidenceError as error:
        if name in error.message:
            raise
        raise type(error)(f"{name}: {error.message}", error.hint) from None
