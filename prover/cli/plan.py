"""The options that describe a session: shared by ``prover run`` and ``verifier session``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import click

from fpforensics.common.cli_specs import complete_spec

if TYPE_CHECKING:
    from fpforensics.prover.session import SessionPlan

F = TypeVar("F", bound=Callable[..., Any])


class PlanOptions(TypedDict):
    """The values of :func:`plan_options`, as click passes them."""

    configs: tuple[str, ...]
    model: str
    prompts: tuple[str, ...]
    instruction: str | None
    references: int
    prompt_tokens: int
    new_tokens: int
    temperature: float
    top_p: float
    seed: int
    layers: str | None
    prefill_positions: int
    decode_positions: int
    top_k: int
    full_logits: bool
    repetitions: int
    allow_nondeterminism: bool


_OPTIONS = (
    click.option(
        "--config",
        "configs",
        multiple=True,
        metavar="KEY=VALUE,…",
        shell_complete=complete_spec,
        help="Execution config, e.g. attn=eager,dtype=fp16. Repeatable: one row each. [default: attn=sdpa,dtype=bf16]",
    ),
    click.option(
        "--model", default="smollm2-135m", show_default=True, help="Embedded model, Hugging Face id or folder."
    ),
    click.option(
        "--prompts",
        multiple=True,
        default=("builtin",),
        show_default=True,
        metavar="SOURCE",
        help="builtin, or a .txt, .md, .pdf or .jsonl file. Repeatable.",
    ),
    click.option("--instruction", default=None, help="Put around each text. [default: a request for a summary]"),
    click.option("--references", default=4, show_default=True, help="How many prompts."),
    click.option("--prompt-tokens", default=256, show_default=True, help="Source tokens in each prompt."),
    click.option("--new-tokens", default=32, show_default=True, help="Tokens generated for each prompt."),
    click.option("--temperature", default=0.0, show_default=True, help="0 is greedy."),
    click.option("--top-p", default=1.0, show_default=True, help="Nucleus sampling."),
    click.option("--seed", default=0, show_default=True, help="Seed of the sampler."),
    click.option(
        "--layers",
        default=None,
        metavar="N,…",
        help="Blocks whose keys and states are kept, from 1, or last. [default: 1,2,4,12,last, as far as the model is deep]",
    ),
    click.option(
        "--prefill-positions",
        default=16,
        show_default=True,
        help="Last prompt positions to keep; all of a prompt that has no more.",
    ),
    click.option("--decode-positions", default=0, show_default=True, help="Last generated positions to keep; 0: all."),
    click.option("--top-k", default=20, show_default=True, help="Log-probabilities kept at each position."),
    click.option(
        "--full-logits",
        is_flag=True,
        help="Keep the logits of the whole vocabulary too, for verifier compare (large: positions x vocabulary).",
    ),
    click.option("--repetitions", default=3, show_default=True, help="Must be bit-identical."),
    click.option("--allow-nondeterminism", is_flag=True, help="Record repetitions' noise instead of stopping."),
)


def plan_options(command: F) -> F:
    """Add every option of a session."""
    for decorate in reversed(_OPTIONS):
        command = decorate(command)
    return command


def make_session_plan(options: PlanOptions, nonce: str) -> SessionPlan:
    """The plan that ``options`` describe. Raises :class:`UsageError` for what makes no sense, whatever the model."""
    from fpforensics.common.config import ExecutionConfig, parse_config
    from fpforensics.common.prompts import DEFAULT_INSTRUCTION
    from fpforensics.common.signals import CapturePlan, Sampling
    from fpforensics.prover.session import SessionPlan, check_plan

    base = ExecutionConfig(model=options["model"])
    instruction, layers = options["instruction"], options["layers"]
    plan = SessionPlan(
        configs=tuple(parse_config(spec, base) for spec in options["configs"] or ("",)),
        documents=options["prompts"],
        references=options["references"],
        prompt_tokens=options["prompt_tokens"],
        instruction=DEFAULT_INSTRUCTION if instruction is None else instruction,
        capture=CapturePlan(
            layers=CapturePlan().layers if layers is None else _parts(layers),
            prefill_positions=options["prefill_positions"],
            decode_positions=options["decode_positions"],
            top_k=options["top_k"],
            full_logits=options["full_logits"],
        ),
        sampling=Sampling(
            max_new_tokens=options["new_tokens"],
            temperature=options["temperature"],
            top_p=options["top_p"],
            seed=options["seed"],
        ),
        repetitions=options["repetitions"],
        allow_nondeterminism=options["allow_nondeterminism"],
        nonce=nonce,
        layers_named=layers is not None,
    )
    check_plan(plan)
    return plan


def _parts(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in text.split(","))))
