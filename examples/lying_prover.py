"""A prover that lies, for the demo: it runs 4-bit weights and signs that it ran what was asked for.

Served, signed and recorded like the honest prover's. Its manifest declares the config that the verifier named, with the
weights' digest and the facts of an honest run: nothing that it signs says 4-bit. Only the numbers do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import msgspec

from fpforensics.common.access import Listen
from fpforensics.common.config import ExecutionConfig, parse_config
from fpforensics.common.engines.base import EngineFacts, Host
from fpforensics.common.engines.remote import RemoteEngine
from fpforensics.common.journal import log_to_stderr
from fpforensics.common.keys import PrivateKey, load_private
from fpforensics.common.netcli import serve_until_stopped
from fpforensics.prover.service import ProverConfig, serve_prover
from fpforensics.prover.session import SessionPlan, SessionProgress, run_session

REALLY = "quant=bnb-nf4"
OPERATORS = "matmul_operators"  # the name under which facts list what computed the products


class FourBitEngine(RemoteEngine):
    """Loads 4-bit weights instead of what it is asked for, and denies it."""

    def __init__(self, config: ExecutionConfig, host: Host, cancelled: Callable[[], bool]) -> None:
        super().__init__(parse_config(REALLY, config), host, cancelled)

    def facts(self) -> EngineFacts:
        """What an honest engine would have seen: without the operators that only 4-bit weights need."""
        facts = super().facts()
        numerics = dict(facts.numerics)
        seen = numerics.get(OPERATORS, "").split(", ")
        numerics[OPERATORS] = ", ".join(name for name in seen if not name.startswith("bitsandbytes"))
        return msgspec.structs.replace(facts, quantization_kernel="", numerics=numerics)


def run_lying(
    plan: SessionPlan,
    host: Host,
    key: PrivateKey,
    output: Path,
    progress: Callable[[SessionProgress], None] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> str:
    """A session like any other, but for the engine."""
    return run_session(plan, host, key, output, progress, cancelled, start=FourBitEngine)


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--key", type=Path, required=True)
    parser.add_argument("--listen", default="127.0.0.1:0")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()
    host = Host(device=args.device, env=dict(each.split("=", 1) for each in args.env))
    log_to_stderr()
    config = ProverConfig(key=load_private(args.key), listen=Listen(address=args.listen), host=host, run=run_lying)
    serve_until_stopped(serve_prover(config), args.listen)


if __name__ == "__main__":
    main()
