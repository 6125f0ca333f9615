"""Config specs on the command line: the keys that ``--help`` lists, and their completion in a shell."""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class, split_arg_string

from fpforensics.common.config import KEYS, choices_of, describe_keys


class SpecCommand(click.Command):
    """A command whose ``--help`` ends with the keys and values of config specs."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table of keys, from the code that reads them."""
        names = {name for parameter in self.params for name in parameter.opts}
        options = [name for name in ("--config", "--claim", "--lineup", "--using") if name in names]
        with formatter.section(f"Keys of {', '.join(options)}, written KEY=VALUE,KEY=VALUE"):
            formatter.write_dl(list(describe_keys().items()))
        formatter.write_paragraph()
        formatter.write_text("What each means, and lineup files: docs/lineup.md.")


def complete_spec(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """``key=`` for what was begun, then its values; after a comma, the keys that are not given yet."""
    before, comma, part = incomplete.rpartition(",")
    key, equals, value = part.partition("=")
    if equals:
        return [
            CompletionItem(f"{before}{comma}{key}={choice}")
            for choice in (choices_of(key) if key in KEYS else ())
            if choice.startswith(value)
        ]
    given = {each.partition("=")[0] for each in before.split(",")}
    keys = [name for name in KEYS if name.startswith(part) and name not in given]
    if len(keys) == 1 and choices_of(keys[0]):
        return complete_spec(ctx, param, f"{before}{comma}{keys[0]}=")
    return [CompletionItem(f"{before}{comma}{name}=") for name in keys]


def complete_lineup(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Specs, and files that end in ``.toml``."""
    folder, slash, begun = incomplete.rpartition("/")
    try:
        found = sorted(Path(folder + slash or ".").iterdir())
    except OSError:
        found = []
    files = [
        f"{folder}{slash}{path.name}{'/' * path.is_dir()}"
        for path in found
        if path.name.startswith(begun) and (path.suffix == ".toml" or (slash and path.is_dir()))
    ]
    return complete_spec(ctx, param, incomplete) + [CompletionItem(name) for name in files]


class _Bash(BashComplete):
    """Click's, but for bash an ``=`` ends a word: words are taken from the line, and only what follows it is answered."""

    source_template = """\
%(complete_func)s() {
    local IFS=$'\\n' completion type value
    for completion in $(env COMP_LINE="${COMP_LINE:0:COMP_POINT}" %(complete_var)s=bash_complete "$1"); do
        IFS=',' read -r type value <<< "$completion"
        if [[ $type == 'dir' ]]; then
            compopt -o dirnames
        elif [[ $type == 'file' ]]; then
            compopt -o default
        else
            COMPREPLY+=("$value")
            [[ $value == *[=/] ]] && compopt -o nospace 2> /dev/null
        fi
    done
    return 0
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words before the one that is being written, and that one."""
        line = os.environ["COMP_LINE"]
        words = split_arg_string(line)[1:]
        self.word = words.pop() if words and not line[-1:].isspace() else ""
        return words, self.word

    def format_completion(self, item: CompletionItem) -> str:
        """``type,value``, without what bash takes for words that are already there."""
        broken = self.word[: max(self.word.rfind(mark) for mark in "=:") + 1]
        value = str(item.value)
        for start in range(len(broken)):  # of an option's own `--config=`, click has told the item nothing
            if value.startswith(broken[start:]):
                value = value[len(broken) - start :]
                break
        return f"{item.type},{value}"


def install_completion() -> None:
    """Let bash complete words that hold an ``=``."""
    add_completion_class(_Bash)
