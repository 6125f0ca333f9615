"""``verifier analyze``: the tables of a published study, from its numbers."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import click

from fpforensics.common.cli import Report, progress_bar, quiet_option, require_outputs
from fpforensics.common.errors import shorten

Canonical = Literal["claimed", "first"]


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE…")
@click.option("--observed", type=click.Path(path_type=Path), help="A second experiment: FILE's configs are claimed, these verified.")  # fmt: skip
@click.option("--canonical", type=click.Choice(["claimed", "first"]), default="claimed", show_default=True, help="Whose token ids are compared: each row's own, or the first config's.")  # fmt: skip
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="How many of the ids, as listed.")
@click.option("--summary", is_flag=True, help="One table over many experiments instead.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, in full precision.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a self-contained HTML page.")
@quiet_option
def analyze(
    files: tuple[Path, ...],
    observed: Path | None,
    canonical: Canonical,
    top: int,
    summary: bool,
    as_json: bool,
    html: Path | None,
    quiet: bool,
) -> None:
    """Compare the configs of an experiment (uniform JSON, .gz too) with one another, or with those of another one.

    Is each config reproducible? How far apart are two machines that do the same? Is each value of the variable seen within
    one machine, and across machines? A measurement on the published scale, not a verdict.

    --json prints one object keyed by phase, then signal, and by nothing else; what was compared, and how, stands in each
    signal as "about". With --summary, a file that cannot be analyzed is a row with its error, and the exit code is 4.

    A FILE of one's own takes a minute: one bundle with a config for each value, exported. In a checkout two small ones lie in examples/experiments.

    \b
    prover run --key prover.key -o attention.msgpack --new-tokens 4 --references 1 --config attn=sdpa --config attn=eager
    verifier export attention.msgpack --key prover.key.pub -o attention_experiment.json

    \b
    verifier analyze attention_experiment.json
    verifier analyze tensor_parallel_H100.json --canonical first
    verifier analyze tensor_parallel_A100.json --observed tensor_parallel_H100.json --html report.html
    verifier analyze --summary *_experiment.json
    """
    from fpforensics.common.errors import UsageError

    require_outputs(html, inputs=(*files, observed))
    if summary and (observed or html):
        raise UsageError("--summary is about whole experiments", "leave out --observed and --html")
    if len(files) > 1 and not summary:
        raise UsageError(f"{len(files)} experiments", "give one, one and --observed, or --summary")
    with progress_bar(quiet) as report:
        if summary:
            text, code = _summarize(files, canonical, top, as_json, report)
        else:
            text, code = _analyze(files[0], observed, canonical, top, as_json, html, report), 0
    click.echo(text, nl=False)
    if code:
        raise click.exceptions.Exit(code)


def _analyze(
    path: Path, observed: Path | None, canonical: Canonical, top: int, as_json: bool, html: Path | None, report: Report
) -> str:
    from fpforensics.common.lab.reader import open_experiment
    from fpforensics.verifier.analysis import analyze as measure
    from fpforensics.verifier.report.analysis_view import Study

    with ExitStack() as files:
        claimed = files.enter_context(open_experiment(path))
        other = files.enter_context(open_experiment(observed)) if observed else None
        study = Study(measure(claimed, other, canonical=canonical, top=top, report=report), claimed, other)
        for each in study.warnings:
            click.echo(f"warning: {each}", err=True)
        if html is not None:
            from fpforensics.verifier.report import analysis_html

            html.write_text(analysis_html.render(study), encoding="utf-8")
        if as_json:
            return _json(study.analysis)
        from fpforensics.verifier.report import analysis_text

        return analysis_text.render(study)


def _summarize(
    files: tuple[Path, ...], canonical: Canonical, top: int, as_json: bool, report: Report
) -> tuple[str, int]:
    """The table and the exit code: that of the worst file. A file that cannot be analyzed is a row too."""
    from fpforensics.common.errors import Error
    from fpforensics.common.lab.reader import open_experiment
    from fpforensics.verifier.analysis import analyze as measure
    from fpforensics.verifier.analysis.summary import SummaryRow, failed, summarize
    from fpforensics.verifier.report.analysis_text import render_summary

    rows: list[SummaryRow] = []
    code = 0
    for done, path in enumerate(files):
        report(f"analyzing {path.name}", done, len(files))
        try:
            with open_experiment(path) as experiment:
                rows += summarize(experiment, measure(experiment, canonical=canonical, top=top), str(path))
        except Error as error:
            rows.append(failed(str(path), error))
            click.echo(f"error: {shorten(str(path), 200)}: {error.diagnostics()}", err=True)
            code = max(code, error.exit_code)
    return _json(rows) if as_json else render_summary(rows), code


def _json(value: object) -> str:
    import msgspec

    return msgspec.json.format(msgspec.json.encode(value)).decode() + "\n"
