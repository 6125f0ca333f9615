"""A suite from start to files: sessions, replays, then everything that can be published."""

from __future__ import annotations

import importlib.util

from fpforensics.common.errors import CancelledError, Error
from fpforensics.verifier.suite.files import Written, write_files
from fpforensics.verifier.suite.folder import is_full, publish
from fpforensics.verifier.suite.forensics import render_forensics
from fpforensics.verifier.suite.journal import ENDED, Journal
from fpforensics.verifier.suite.replays import run_replays
from fpforensics.verifier.suite.run import Clock, StoppedError, run_sessions
from fpforensics.verifier.suite.sessions import Report, Setting


def run_suite(
    setting: Setting,
    report: Report = lambda _stage, _done, _total: None,
    *,
    clock: Clock | None = None,
    again: bool = False,
    sessions: bool = True,
) -> Written:
    """Do what is not done yet in the run of ``setting.folder``, and write its files; without ``sessions``, replays alone.

    Raises :class:`StoppedError` where it cannot go on now; whatever is done stays done. ``again`` tries what was skipped.
    """
    folder = setting.folder
    with Journal(folder.journal) as journal:
        folder.tidy()
        try:
            if sessions:
                run_sessions(setting, journal, report, clock=clock, again=again)
            run_replays(setting, journal, report, again=again)
            written = write_files(setting, dict(journal.latest(*ENDED)), report)
            _write_page(setting, written)
        except (StoppedError, CancelledError):
            raise
        except (Error, OSError) as error:
            if not is_full(error):
                raise
            said = error.message if isinstance(error, Error) else str(error.strerror or error)
            raise StoppedError(
                f"the disk is full: {said}", f"free space; then: verifier suite resume {folder.path}"
            ) from error
    return written


def _write_page(setting: Setting, written: Written) -> None:
    """The page, where its renderer is installed; the numbers are in the other files all the same."""
    from fpforensics.verifier.suite.page import render

    if importlib.util.find_spec("jinja2") is None:
        return
    names = [
        "summary.json",
        "analysis_reports.json",
        "experiments.json",
        "reference_baseline.json",
        *(each.file for each in written.experiments if each.file),
        "suite.json",
        "journal.jsonl",
    ]
    page = render(setting.suite, written, [name for name in names if (setting.folder.path / name).exists()])
    publish(setting.folder.path / "report.html", page.encode())


def render_states(written: Written) -> str:
    """What ran and what did not, for a terminal: experiment by experiment, then each reason once with all that it is of."""
    lines = []
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for each in written.experiments:
        states = [config.state for config in each.configs]
        done = f"{states.count('finished')} of {len(states)} configs" if states else f"skipped: {each.skipped}"
        lines.append(f"{each.name:<22} {done}")
        lines += [f"{'':<22} {render_forensics(found)}" for found in each.forensics]
        for config in each.configs:
            if config.state != "finished":
                reasons.setdefault((config.state, config.reason), {})[f"{config.prover}.{config.config}"] = None
        for name, reason in each.replays_skipped.items():
            reasons.setdefault(("not replayed", reason), {})[name] = None
    lines += [f"{state}: {', '.join(names)}: {reason}" for (state, reason), names in reasons.items()]
    return "\n".join(lines) + "\n"
