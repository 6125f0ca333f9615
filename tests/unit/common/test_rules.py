from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from synthetic import Size, write_synthetic

from fpforensics.common.bundle_file import BundleFile
from fpforensics.common.errors import EvidenceError, UsageError
from fpforensics.common.manifest import blob_sizes, decode_statement
from fpforensics.common.rules import check_statement
from fpforensics.common.strict import Limits

LIMITS = Limits()
Edit = Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], object]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("rules") / "bundle.msgpack"
    write_synthetic(path, Size(rows=2, references=2, logits=True))
    with BundleFile(path) as file:
        found: dict[str, Any] = json.loads(file.envelope.payload)
    return found


def check(manifest: dict[str, Any], limits: Limits = LIMITS) -> None:
    statement = decode_statement(json.dumps(manifest).encode(), limits)
    check_statement(statement, limits)
    blob_sizes(statement.predicate)


def test_an_honest_manifest_passes(manifest: dict[str, Any]) -> None:
    check(manifest)


# Each edit gets the predicate, its first row and that row's first trace.
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda p, r, t: p.update(created_at="yesterday"), "created_at 'yesterday'"),
        (lambda p, r, t: p.update(created_at="2026-01-31T12:00:00"), "no time with a zone"),
        (lambda p, r, t: p.update(nonce="abc"), "nonce 'abc'"),
        (lambda p, r, t: p.update(nonce="AB"), "nonce 'AB'"),
        (lambda p, r, t: p.update(session_id=""), "session id ''"),
        (lambda p, r, t: p["capture"].update(layers=["0"]), "layer '0'"),
        (lambda p, r, t: p["capture"].update(top_k=0), "top_k: 0"),
        (lambda p, r, t: p["sampling"].update(seed=-1), "seed: -1"),
        (lambda p, r, t: p["sampling"].update(max_new_tokens=3), "1 to 3"),
        (lambda p, r, t: p["references"].pop(), "subjects"),
        (lambda p, r, t: p["references"][1].update(id="ref_0"), "'ref_0' is given 2 times"),
        (lambda p, r, t: p["references"][0]["prompt_ids"].update(shape=[]), r"shape \(\)"),
        (lambda p, r, t: p["references"][0]["prompt_ids"].update(shape=[0]), r"shape \(0,\)"),
        (lambda p, r, t: p["references"][0]["prompt_ids"].update(dtype="f32"), "dtype 'f32'"),
        (lambda p, r, t: p["rows"].append(r), "given 2 times"),
        (lambda p, r, t: r.update(config_id=""), "config id ''"),
        (lambda p, r, t: r["config"].update(tensor_parallel=0), "tensor_parallel: 0"),
        (lambda p, r, t: r["config"].update(emulate_tensor_parallel=0), "emulate_tensor_parallel: 0"),
        (lambda p, r, t: r["config"].update(emulate_tensor_parallel=4097), "emulate_tensor_parallel: 4097"),
        (lambda p, r, t: r["config"].update(batch_size=1 << 62), "batch_size: 4611686018427387904"),
        (lambda p, r, t: r["config"].update(weights_digest="sha256:" + "0" * 64), "different weights"),
        (lambda p, r, t: r["facts"]["model"].update(weights_digest=""), "weights digest ''"),
        (lambda p, r, t: r["facts"]["model"].update(vocab_size=0), "vocab_size: 0"),
        (lambda p, r, t: r["facts"]["model"].update(vocab_size=65), r"\(2, 65\) is expected"),
        (lambda p, r, t: r["facts"]["model"].update(hidden_size=16), r"\(2, 16\) is expected"),
        (lambda p, r, t: r["facts"]["model"].update(key_width=2), r"\(2, 2\) is expected"),
        (lambda p, r, t: r["facts"]["model"].update(num_layers=1 << 40), "num_layers"),
        (lambda p, r, t: r["facts"].update(batch_sizes=[0]), "batch_sizes: 0"),
        (lambda p, r, t: r["repetitions"].update(count=3), "3 repetitions and 2 wall times"),
        (lambda p, r, t: r["repetitions"].update(count=0, wall_seconds=[]), "repetitions: 0"),
        (lambda p, r, t: r["repetitions"].update(wall_mean=-1.0), "wall time: -1.0"),
        (lambda p, r, t: r["traces"].pop(), "no trace of ref_1"),
        (lambda p, r, t: r["traces"].append(t), "'ref_0' is given 2 times"),
        (lambda p, r, t: t.update(reference_id="ref_9"), "unknown reference 'ref_9'"),
        (lambda p, r, t: t["decode"].pop("positions"), "decode lacks positions"),
        (lambda p, r, t: t["prefill"].pop("chosen_logprobs"), "prefill lacks chosen_logprobs"),
        (lambda p, r, t: t["decode"]["positions"].update(shape=[4]), "at most 3 fits between positions 6 and 8"),
        (lambda p, r, t: t["decode"]["positions"].update(shape=[3, 1]), "a vector"),
        (lambda p, r, t: t["decode"]["logprob_ids"].update(shape=[3, 0]), "columns: 0"),
        (lambda p, r, t: t["decode"]["logprob_ids"].update(shape=[3, 65]), "columns: 65"),
        (lambda p, r, t: t["decode"]["logprobs"].update(shape=[3, 2]), r"\(3, 3\) is expected"),
        (lambda p, r, t: t["decode"]["logprobs"].update(shape=[-3, -3]), "none negative"),
        (lambda p, r, t: t["decode"]["logprobs"].update(shape=[1] * 1000), "at most 4 sizes"),
        (lambda p, r, t: t["decode"]["logprobs"].update(shape=[1 << 40, 1 << 40]), f"claims {1 << 80} elements"),
        (lambda p, r, t: t["decode"]["logprobs"].update(shape=[0, 1 << 62]), r"\(3, 3\) is expected"),
        (lambda p, r, t: t["decode"]["logprobs"].update(dtype="bf16"), "must be f32"),
        (lambda p, r, t: t["decode"]["logprobs"].update(dtype="f8"), "dtype 'f8'"),
        (lambda p, r, t: t["decode"]["logprobs"].update(sha256="A" * 64), "SHA-256 'AAAA"),
        (lambda p, r, t: t["decode"]["logprobs"].update(sha256=t["output_ids"]["sha256"]), "is both 16 and 36"),
        (lambda p, r, t: t["decode"].update({"hidden_states/5": t["output_ids"]}), "layer '5'"),
        (lambda p, r, t: t["decode"].update({"hidden_states/01": t["output_ids"]}), "layer '01'"),
        (lambda p, r, t: t["decode"].update({"hidden_states/²": t["output_ids"]}), "layer '²'"),
        (lambda p, r, t: t["decode"].update({"hidden_states/": t["output_ids"]}), "layer ''"),
        (lambda p, r, t: t["decode"].update({"hidden_states": t["output_ids"]}), "unknown tensor 'hidden_states'"),
        (lambda p, r, t: t["decode"].update({"key_vectors/../x": t["output_ids"]}), "layer '../x'"),
        (lambda p, r, t: t["decode"].update({"logprob": t["output_ids"]}), "unknown tensor 'logprob'"),
        (lambda p, r, t: t["output_ids"].update(shape=[0]), r"shape \(0,\)"),
    ],
)
def test_broken_rules_are_named(manifest: dict[str, Any], edit: Edit, message: str) -> None:
    changed = copy.deepcopy(manifest)
    predicate = changed["predicate"]
    edit(predicate, predicate["rows"][0], predicate["rows"][0]["traces"][0])
    with pytest.raises(EvidenceError) as caught:
        check(changed)
    assert re.search(message, caught.value.diagnostics()), caught.value.diagnostics()
    assert caught.value.diagnostics().isprintable()
    assert caught.value.hint


@pytest.mark.parametrize(
    "limits",
    [
        Limits(references=1),
        Limits(rows=1),
        Limits(tensors=20),
        Limits(elements=16),
        Limits(prompt_tokens=5),
        Limits(output_tokens=3),
        Limits(width=63),
        Limits(layers=3),
        Limits(repetitions=1),
        Limits(string=8),
        Limits(nesting=4),
        Limits(manifest_bytes=1000),
    ],
    ids=lambda limits: "".join(
        name for name, value in msgspec.structs.asdict(limits).items() if value != getattr(LIMITS, name)
    ),
)
def test_every_limit_limits(manifest: dict[str, Any], limits: Limits) -> None:
    with pytest.raises(EvidenceError):
        check(manifest, limits)


def test_a_trace_without_positions_is_no_evidence(manifest: dict[str, Any]) -> None:
    changed = copy.deepcopy(manifest)
    trace = changed["predicate"]["rows"][0]["traces"][0]
    for phase in ("prefill", "decode"):
        for name, tensor in trace[phase].items():
            tensor.update(shape=[0, *tensor["shape"][1:]], sha256=f"{len(name):064x}")
    with pytest.raises(EvidenceError, match="holds no positions"):
        check(changed)


def test_the_path_in_a_message_is_a_place_in_the_manifest(manifest: dict[str, Any]) -> None:
    changed = copy.deepcopy(manifest)
    changed["predicate"]["rows"][1]["config"]["batch_size"] = "two"
    with pytest.raises(EvidenceError, match=r"\$\.predicate\.rows\[1\]\.config\.batch_size"):
        check(changed)


def test_a_folder_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a file"):
        BundleFile(tmp_path)
