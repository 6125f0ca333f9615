from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from assets.generate import FOLDER, GOLDEN
from click.testing import CliRunner
from synthetic import OTHER_KEY, TEST_KEY

from fpforensics.common.errors import EvidenceError, SignatureError
from fpforensics.common.inspect import BundleSummary, render_json, render_text, summarize
from fpforensics.common.keys import Keyring, PrivateKey
from fpforensics.prover.cli.inspect import inspect

PATH = FOLDER / GOLDEN
TRUSTING = Keyring([TEST_KEY.public])


def test_without_a_key_it_says_loudly_that_nothing_was_checked() -> None:
    summary = summarize(PATH)
    assert summary.signature.state == "not checked"
    text = render_text(summary)
    assert text.splitlines()[1] == "!! signature NOT checked: no key given"
    assert f"names key {TEST_KEY.keyid}" in text


def test_with_the_key_it_says_who_signed() -> None:
    summary = summarize(PATH, TRUSTING)
    assert (summary.signature.state, summary.signature.keyid) == ("trusted", TEST_KEY.keyid)
    assert "!!" not in render_text(summary)


def test_a_stranger_is_not_trusted() -> None:
    summary = summarize(PATH, Keyring([OTHER_KEY.public]))
    assert summary.signature.state == "not trusted"
    assert "!! NOT TRUSTED: no trusted key signed this" in render_text(summary)
    forged = summarize(FOLDER / "hostile" / "flipped-manifest.msgpack", TRUSTING)
    assert forged.signature.state == "not trusted"


def test_everything_a_person_asks_for_is_shown() -> None:
    text = render_text(summarize(PATH, TRUSTING))
    for shown in (
        "Row attn=eager",
        "Row attn=sdpa",
        "attn=eager,tp=1",
        "prefill: aten::none",
        "2, bit-identical",
        "1.50, 2.50 s (mean 2.00 s, variance 0.5 s²)",
        "6 prompt tokens, 4 generated each",
        "hidden_states: layers 1, last; 3 positions; bf16",
        "logprobs: 2 positions; f32",
        "every digest fits",
        "00112233445566778899aabbccddeeff",
        "host         nowhere",
    ):
        assert shown in text


def test_generated_tokens_are_one_number_or_a_range() -> None:
    summary = summarize(PATH, TRUSTING)
    for counts, said in (((4,), "4 generated"), ((1, 4, 2), "1 to 4 generated"), ((2, 2, 2), "2 generated each")):
        reference = msgspec.structs.replace(summary.references[0], output_tokens=counts)
        assert said in render_text(msgspec.structs.replace(summary, references=(reference,)))


def test_json_holds_the_same(tmp_path: Path) -> None:
    plain = json.loads(render_json(summarize(PATH)))
    assert plain["signature"]["state"] == "not checked"
    assert plain["rows"][0]["config"]["attention"] == "eager"
    assert plain["rows"][0]["signals"][0] == {
        "phase": "prefill",
        "signal": "logprobs",
        "layers": [],
        "dtypes": ["f32"],
        "positions": [2, 2],
    }


def test_the_header_alone_does_not_touch_the_blobs(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.msgpack"
    data = bytearray(PATH.read_bytes())
    data[-1] ^= 0x80
    damaged.write_bytes(data)
    assert summarize(damaged, TRUSTING, header_only=True).blobs.intact is None
    whole = summarize(damaged, TRUSTING)
    assert whole.blobs.intact is False
    assert "DAMAGED: blob" in render_text(whole)
    damaged.write_bytes(data[:-100])
    assert summarize(damaged, header_only=True).blobs.bytes == whole.blobs.bytes
    assert "cut short" in summarize(damaged).blobs.problem


@pytest.mark.parametrize("path", sorted((FOLDER / "hostile").glob("*.msgpack")), ids=lambda path: path.stem)
def test_hostile_files_are_summarized_or_refused_and_never_print_control_characters(path: Path) -> None:
    try:
        summary = summarize(path)
    except EvidenceError as error:
        assert error.diagnostics().isprintable()
        return
    assert isinstance(summary, BundleSummary)
    assert all(line.isprintable() for line in render_text(summary).splitlines())


def test_what_no_trusted_key_signed_is_said_before_what_it_says_wrong(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.msgpack"
    damaged.write_bytes(PATH.read_bytes().replace(b'"name"', b'"namd"', 1))
    with pytest.raises(EvidenceError, match="malformed"):
        summarize(damaged)
    with pytest.raises(SignatureError, match="does not fit"):
        summarize(damaged, TRUSTING)


def test_no_torch_is_needed() -> None:
    code = (
        "import sys; from pathlib import Path; from fpforensics.common.inspect import summarize, render_text\n"
        f"render_text(summarize(Path({str(PATH)!r})))\n"
        "print(sorted({'torch', 'grpc', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("changed", "trusted", "code"), [(False, None, 0), (False, TEST_KEY, 0), (True, None, 4), (False, OTHER_KEY, 4)]
)
def test_damage_and_distrust_are_in_the_exit_code(
    tmp_path: Path, changed: bool, trusted: PrivateKey | None, code: int
) -> None:
    bundle = tmp_path / "bundle.msgpack"
    data = bytearray(PATH.read_bytes())
    data[-1] ^= 0x80 * changed
    bundle.write_bytes(data)
    arguments = [str(bundle)]
    if trusted is not None:
        (tmp_path / "key.pub").write_bytes(trusted.public.pem())
        arguments += ["--key", str(tmp_path / "key.pub")]
    for form in ([], ["--json"]):
        done = CliRunner().invoke(inspect, [*arguments, *form])
        assert done.exit_code == code
        assert ("DAMAGED" in done.output) == (changed and not form)
