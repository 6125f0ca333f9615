from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import OTHER_KEY, TEST_KEY

from fpforensics.common.errors import SignatureError, UsageError
from fpforensics.common.keys import Keyring, PrivateKey, generate, load_private, load_public, public_path
from fpforensics.prover.cli import cli as prover
from fpforensics.verifier.cli import cli as verifier


def test_a_generated_pair_signs_and_verifies(tmp_path: Path) -> None:
    public = generate(tmp_path / "prover.key")
    private = load_private(tmp_path / "prover.key")
    assert load_public(tmp_path / "prover.key.pub") == public == private.public
    assert private.keyid == public.keyid
    public.verify(private.sign(b"evidence"), b"evidence")


def test_files_have_the_modes_that_keep_a_secret(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        generate(tmp_path / "prover.key")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "prover.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "prover.key.pub").stat().st_mode) == 0o644


@settings(deadline=None)
@given(st.binary(max_size=200), st.binary(min_size=1, max_size=200))
def test_a_signature_fits_one_key_and_one_message(message: bytes, other: bytes) -> None:
    signature = TEST_KEY.sign(message)
    TEST_KEY.public.verify(signature, message)
    with pytest.raises(SignatureError):
        TEST_KEY.public.verify(signature, message + other)
    with pytest.raises(SignatureError):
        OTHER_KEY.public.verify(signature, message)


@pytest.mark.parametrize("existing", ["prover.key", "prover.key.pub"])
def test_nothing_is_overwritten_and_nothing_half_made_is_left(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_text("mine")
    with pytest.raises(UsageError, match=f"^{re.escape(str(tmp_path / existing))} exists already"):
        generate(tmp_path / "prover.key")
    assert [path.name for path in tmp_path.iterdir()] == [existing]
    assert (tmp_path / existing).read_text() == "mine"


def test_a_second_key_of_one_name_is_refused_by_both_files(tmp_path: Path) -> None:
    path = tmp_path / "prover.key"
    first = generate(path)
    with pytest.raises(UsageError) as caught:
        generate(path)
    assert caught.value.message == f"{path} and {path}.pub exist already" and "use what is there" in caught.value.hint
    assert load_public(public_path(path)) == first


@pytest.mark.parametrize("name", [".", "", "/", "prover.key.pub"])
def test_a_private_key_has_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is no name for a private key"):
        generate(Path(name))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o610])
def test_a_private_key_open_to_others_is_refused_with_the_command_that_helps(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "prover.key"
    generate(path)
    path.chmod(mode)
    with pytest.raises(UsageError, match=f"mode 0{mode:o}") as caught:
        load_private(path)
    assert f"chmod 600 {path}" in caught.value.diagnostics()


def test_keys_do_not_show_their_secret(tmp_path: Path) -> None:
    generate(tmp_path / "prover.key")
    key = load_private(tmp_path / "prover.key")
    secret = key.pem().splitlines()[1].decode()
    assert secret not in repr(key) + str(key) + repr(vars(key))
    with pytest.raises(TypeError):
        key.__reduce_ex__(4)  # what pickle and copy call


def test_the_wrong_kind_of_key_file_is_named(tmp_path: Path) -> None:
    generate(tmp_path / "a.key")
    with pytest.raises(UsageError, match=r"a\.key is a private key") as caught:
        load_public(tmp_path / "a.key")
    assert str(public_path(tmp_path / "a.key")) in caught.value.hint
    with pytest.raises(UsageError, match=r"a\.key\.pub is a public key") as caught:
        load_private(tmp_path / "a.key.pub")
    assert caught.value.hint == f"give {tmp_path / 'a.key'}"
    (tmp_path / "a.key.pub").rename(tmp_path / "renamed")
    with pytest.raises(UsageError, match="is a public key") as caught:
        load_private(tmp_path / "renamed")
    assert "beside it" in caught.value.hint
    with pytest.raises(UsageError, match="does not exist"):
        load_private(tmp_path / "b.key")
    with pytest.raises(UsageError, match="is not a file"):
        load_private(tmp_path)


def test_other_algorithms_and_encrypted_keys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ec.key"
    key = ec.generate_private_key(ec.SECP256R1())
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.write_bytes(key.private_bytes(encoding, form, serialization.NoEncryption()))
    path.chmod(0o600)
    with pytest.raises(UsageError, match="not Ed25519"):
        load_private(path)
    path.write_bytes(key.private_bytes(encoding, form, serialization.BestAvailableEncryption(b"secret")))
    with pytest.raises(UsageError, match="is encrypted"):
        load_private(path)
    path.write_bytes(key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(UsageError, match="not Ed25519"):
        load_public(path)


@pytest.mark.parametrize(("program", "group"), [("prover", prover), ("verifier", verifier)])
def test_each_keygen_names_its_own_program(program: str, group: click.Group, tmp_path: Path) -> None:
    runner = CliRunner()
    shown = runner.invoke(group, ["keygen", "--help"]).output
    assert f"{program} keygen {program}.key" in shown
    path = tmp_path / "new.key"
    assert runner.invoke(group, ["keygen", str(path)]).exit_code == 0
    assert load_private(path).public == load_public(public_path(path))


@settings(deadline=None)
@given(data=st.binary(max_size=300))
def test_garbage_is_a_usage_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage.key"
    path.write_bytes(data)
    path.chmod(0o600)
    for load in (load_private, load_public):
        with pytest.raises(UsageError):
            load(path)


def test_a_keyring_reads_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "trusted").mkdir()
    first = generate(tmp_path / "trusted" / "a.key")
    second = generate(tmp_path / "trusted" / "b.key")
    third = generate(tmp_path / "c.key")
    keyring = Keyring.from_paths([tmp_path / "trusted", tmp_path / "c.key.pub"])
    assert set(keyring) == set(keyring.all()) == {first, second, third}
    assert keyring.get(second.keyid) == second
    assert keyring.get(PrivateKey.fresh().keyid) is None


def test_an_empty_keyring_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no \*\.pub"):
        Keyring.from_paths([tmp_path])
