"""The store: nothing half-kept, one bundle for each nonce, verdicts without gaps, whatever fails or races."""

from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from fpforensics.common.errors import LimitError, NonceError, NotFoundError, UsageError
from fpforensics.verifier import store as store_module
from fpforensics.verifier.store import Store, StoredBundle, StoredVerdict


def digest(number: int) -> str:
    return f"sha256:{number:064x}"


def keep(
    store: Store, number: int, nonce: str = "", *, content: bytes = b"bundle", require: bool = False
) -> StoredBundle:
    with store.spool() as spool:
        spool.file.write(content)
        return store.adopt(spool, digest(number), "signer", nonce, require_challenge=require)


def seal_about(number: int) -> StoredVerdict:
    raise AssertionError(number)


def append(store: Store, bundle: int = 1) -> StoredVerdict:
    return store.append_verdict(
        lambda sequence: StoredVerdict(sequence, f"verdict-{sequence}", digest(bundle), "CONSISTENT", b"%d" % sequence)
    )


def files(folder: Path) -> list[str]:
    return sorted(path.name for part in ("bundles", "spool") for path in (folder / part).iterdir())


def test_a_bundle_is_kept_byte_for_byte_and_survives_reopening(tmp_path: Path) -> None:
    with Store(tmp_path / "s") as store:
        kept = keep(store, 1, "aa", content=b"\x00exact\xff")
    with Store(tmp_path / "s") as store:
        assert store.bundle(digest(1)) == kept
        assert kept.path.read_bytes() == b"\x00exact\xff"
        with pytest.raises(NotFoundError):
            store.bundle(digest(2))


def test_the_same_bundle_again_changes_nothing(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        first = keep(store, 1, "aa", content=b"first")
        assert keep(store, 1, "aa", content=b"first") == first
        assert files(tmp_path) == [first.path.name]


def test_a_nonce_is_answered_by_one_bundle(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        nonce = store.issue_nonce(60)
        kept = keep(store, 1, nonce, require=True)
        assert kept.challenged
        with pytest.raises(NonceError, match="already answered"):
            keep(store, 2, nonce)
        assert files(tmp_path) == [kept.path.name]
        assert not keep(store, 3).challenged
        assert not keep(store, 4).challenged  # no nonce is not a nonce used twice


def test_a_required_challenge_must_be_ours_and_fresh(tmp_path: Path) -> None:
    clock = [1000.0]
    with Store(tmp_path, now=lambda: clock[0]) as store:
        nonce = store.issue_nonce(60)
        for number, (foreign, message) in enumerate({"": "answers no challenge", "ab" * 32: "none of this"}.items()):
            with pytest.raises(NonceError, match=message):
                keep(store, number, foreign, require=True)
        clock[0] += 61
        with pytest.raises(NonceError, match="too late"):
            keep(store, 5, nonce, require=True)
        assert files(tmp_path) == []
        assert not keep(store, 5, nonce).challenged  # taken where none is required, and said so


def test_a_bundle_taken_without_a_challenge_does_not_pass_as_challenged_later(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        keep(store, 1)
        with pytest.raises(NonceError):
            keep(store, 1, require=True)


def test_open_challenges_are_bounded_and_expire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_OPEN_NONCES", 3)
    clock = [0.0]
    with Store(tmp_path, now=lambda: clock[0]) as store:
        assert len({store.issue_nonce(60) for _ in range(3)}) == 3
        with pytest.raises(LimitError):
            store.issue_nonce(60)
        clock[0] = 61
        assert len(bytes.fromhex(store.issue_nonce(60))) == 32


def test_racing_bundles_with_one_nonce_leave_one_winner(tmp_path: Path) -> None:
    with Store(tmp_path) as store, ThreadPoolExecutor(8) as pool:
        nonce = store.issue_nonce(60)
        start = threading.Barrier(8)

        def submit(number: int) -> bool:
            start.wait()
            try:
                keep(store, number, nonce)
            except NonceError:
                return False
            return True

        assert sum(pool.map(submit, range(8))) == 1
        assert len(files(tmp_path)) == 1


def test_racing_submitters_of_one_bundle_agree(tmp_path: Path) -> None:
    with Store(tmp_path) as store, ThreadPoolExecutor(8) as pool:
        nonce = store.issue_nonce(60)
        kept = list(pool.map(lambda _: keep(store, 1, nonce), range(16)))
        assert len(set(kept)) == 1
        assert kept[0].challenged
        assert len(files(tmp_path)) == 1


def test_nothing_stays_when_the_row_cannot_be_committed(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        with closing(sqlite3.connect(tmp_path / "verifier.sqlite")) as other:
            other.execute("CREATE TRIGGER no BEFORE INSERT ON bundles BEGIN SELECT RAISE(ABORT, 'no'); END")
        with pytest.raises(sqlite3.IntegrityError):
            keep(store, 1)
        assert files(tmp_path) == []
        with closing(sqlite3.connect(tmp_path / "verifier.sqlite")) as other:
            other.execute("DROP TRIGGER no")
        assert keep(store, 1).path.exists()


def test_what_a_crash_left_is_swept_and_what_was_kept_stays(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        kept = keep(store, 1)
    (tmp_path / "bundles" / f"{2:064x}.msgpack").write_bytes(b"renamed, row never committed")
    (tmp_path / "spool" / "tmpabc").mkdir()
    (tmp_path / "spool" / "tmpabc" / "bundle").write_bytes(b"half")
    with Store(tmp_path) as store:
        assert files(tmp_path) == [kept.path.name]
        assert store.bundle(digest(1)) == kept


def test_verdicts_are_numbered_without_gaps_even_when_one_fails(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        keep(store, 1)
        assert append(store).sequence == 1
        with pytest.raises(AssertionError):
            store.append_verdict(seal_about)
        with ThreadPoolExecutor(8) as pool:
            numbers = sorted(verdict.sequence for verdict in pool.map(lambda _: append(store), range(20)))
        assert numbers == list(range(2, 22))
        assert store.verdict("verdict-7").envelope == b"7"
        with pytest.raises(NotFoundError):
            store.verdict("verdict-99")
    with Store(tmp_path) as store:
        assert store.last_sequence() == 21
        assert append(store).sequence == 22


def test_a_verdict_needs_its_bundle(tmp_path: Path) -> None:
    with Store(tmp_path) as store, pytest.raises(sqlite3.IntegrityError):
        append(store, bundle=9)


def test_pages_are_bounded_in_number_and_bytes(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        keep(store, 1)
        for _ in range(12):
            append(store)

        def page(after: int, limit: int, max_bytes: int) -> list[int]:
            return [verdict.sequence for verdict in store.verdicts(after, limit, max_bytes)]

        assert page(0, 5, 1000) == [1, 2, 3, 4, 5]
        assert page(10, 5, 1000) == [11, 12]
        assert page(0, 5, 3) == [1, 2, 3]
        assert page(9, 5, 1) == [10]  # larger than the bound, and still shown
        assert page(12, 5, 1000) == []


def test_a_watcher_wakes_for_a_verdict_and_for_its_own_end(tmp_path: Path) -> None:
    with Store(tmp_path) as store, ThreadPoolExecutor(2) as pool:
        keep(store, 1)
        gone = threading.Event()
        news = pool.submit(store.wait_beyond, 0, lambda: False)
        end = pool.submit(store.wait_beyond, 1, gone.is_set)
        append(store)
        assert news.result(timeout=60) is True
        gone.set()
        store.wake()
        assert end.result(timeout=60) is False


def test_one_process_owns_a_store(tmp_path: Path) -> None:
    with Store(tmp_path), pytest.raises(UsageError, match="in use"):
        Store(tmp_path)
    Store(tmp_path).close()


def test_another_schema_is_refused_and_untouched(tmp_path: Path) -> None:
    Store(tmp_path).close()
    database = tmp_path / "verifier.sqlite"
    with closing(sqlite3.connect(database)) as db:
        db.execute("PRAGMA user_version = 99")
    for _ in range(2):  # the refusal lets go of the folder
        with pytest.raises(UsageError, match="schema version 99"):
            Store(tmp_path)
    database.write_bytes(b"this is no database" * 100)
    with pytest.raises(UsageError, match="cannot be used"):
        Store(tmp_path)


def test_the_folder_is_private(tmp_path: Path) -> None:
    with Store(tmp_path / "deep" / "store") as store:
        kept = keep(store, 1)
        assert (tmp_path / "deep" / "store").stat().st_mode & 0o077 == 0
        assert kept.path.parent.stat().st_mode & 0o077 == 0
