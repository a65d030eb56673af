"""What a place of results can do, found by trying; and what `mixmo doctor` says follows from it."""

import re
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import botocore.auth
import pytest
from made_rows import finished, in_a_folder
from odd_servers import BOTH, Elsewhen, Lagging, Unconditional

from orchestrator import doctor
from orchestrator.errors import ExitCode
from orchestrator.store import ResultStore
from orchestrator.store import bucket as buckets
from orchestrator.store.abilities import Abilities, find
from orchestrator.store.bucket import Address, Bucket

PAGE = (Path(__file__).parent.parent / "docs" / "storage.md").read_text()
ALL = Abilities(read_back=True, listed=True, created=1, swapped=1, fenced=True, ahead_s=0.0)


def said(found: Abilities) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.abilities_mean(found)}


def test_every_place_that_we_know_does_all(store: ResultStore) -> None:
    objects = store.folder
    found = find(objects, ".tried")
    assert replace(found, ahead_s=0.0) == ALL
    assert abs(found.ahead_s) < 10
    assert (objects.names(".tried"), objects.sizes("")) == ([], {})


def test_a_server_that_forgets_conditions_is_no_fence(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "SETTLE_S", 0.05)
    found = find(behind(bucket, lambda client: Unconditional(client, forgets=BOTH)), ".tried")
    assert (found.read_back, found.listed, found.fenced) == (True, True, False)


@pytest.mark.parametrize("late", ["lists", "reads"])
def test_a_server_that_lags_is_found_out(bucket: str, late: str) -> None:
    objects = behind(bucket, lambda client: client)
    assert objects._conditions().create
    objects._client = Lagging(objects._client, **{late: True})
    found = find(objects, ".tried")
    assert (found.read_back, found.listed) == (late != "reads", late != "lists")


def test_a_clock_that_differs_is_measured(bucket: str) -> None:
    class Behind(Elsewhen):
        behind_s = 120.0

    assert 110 < find(behind(bucket, Behind), ".tried").ahead_s < 130


def behind(bucket: str, make: Callable[[Any], Any]) -> Bucket:
    made = Bucket.open(bucket)
    made._client = make(made._client)
    return made


# ------------------------------------------------------------------------------------------------- what the doctor says


@pytest.mark.parametrize(
    ("found", "name", "verdict", "text"),
    [
        (ALL, "whole objects", "good", "what is read"),
        (ALL, "lists", "good", "at once"),
        (ALL, "second driver", "good", "refused at once"),
        (ALL, "stale drivers", "good", "refused"),
        (ALL, "clock", "good", "0 s"),
        (replace(ALL, read_back=False), "whole objects", "bad", "lose track"),
        (replace(ALL, listed=False), "lists", "note", "No row depends on it"),
        (replace(ALL, created=3), "second driver", "note", r"within 60 s \(of 8 at once, 3 believe"),
        (replace(ALL, swapped=0), "second driver", "note", r"and 0 replaced one"),
        (replace(ALL, fenced=False), "second driver", "note", "within 60 s"),
        (replace(ALL, fenced=False), "stale drivers", "note", "may land once"),
        (replace(ALL, ahead_s=95.0), "clock", "note", "95 s ahead of"),
        (replace(ALL, ahead_s=-95.0), "clock", "note", "95 s behind"),
    ],
)
def test_the_doctor_says_what_follows(found: Abilities, name: str, verdict: str, text: str) -> None:
    check = said(found)[name]
    assert check.verdict == verdict
    assert re.search(text, check.found)


def test_a_place_that_loses_what_it_was_told_ends_with_7() -> None:
    assert doctor.verdict(doctor.abilities_mean(ALL)) is ExitCode.OK
    assert doctor.verdict(doctor.abilities_mean(replace(ALL, created=2, fenced=False, listed=False))) is ExitCode.OK
    assert doctor.verdict(doctor.abilities_mean(replace(ALL, read_back=False))) is ExitCode.UNREACHABLE


def test_the_doctor_tries_the_place_and_leaves_nothing(place: str) -> None:
    checks = {check.name: check for check in doctor.place(place)}
    assert {"results", "whole objects", "lists", "second driver", "stale drivers", "clock"} <= checks.keys()
    assert {check.verdict for name, check in checks.items() if name != "disk"} == {"good"}
    assert ResultStore.open(place).folder.sizes("") == {}
    assert place.startswith("s3://") or not list(Path(place).parent.iterdir())


def test_a_server_that_forgets_to_encrypt_is_told(bucket: str) -> None:
    made = Bucket.open(f"{bucket}&sse=aws:kms")
    assert [check.found for check in doctor.place(made.uri) if check.name == "encryption"] == ["aws:kms"]
    made._client = Unconditional(made._client, forgets=("ServerSideEncryption",))
    check = doctor.encryption(made)
    assert (check.verdict, check.code) == ("bad", ExitCode.UNREACHABLE)
    assert "leave sse out" in check.advice


@pytest.mark.slow
def test_a_real_server_that_refuses_to_encrypt_is_told(ceph_bucket: str) -> None:
    """Ceph does over https alone."""
    (check,) = doctor.place(f"{ceph_bucket}&sse=AES256")
    assert (check.verdict, check.code) == ("bad", ExitCode.UNREACHABLE)
    assert "Some do over https alone; else leave sse out of the address" in check.found


def test_the_page_tells_all_that_the_doctor_may_say(bucket: str) -> None:
    """Each remark and each fault, by its check and in its words."""
    worst = replace(ALL, read_back=False, listed=False, created=2, fenced=False, ahead_s=95.0)
    forgetful = Bucket.open(f"{bucket}&sse=AES256")
    forgetful._client = Unconditional(forgetful._client, forgets=("ServerSideEncryption",))
    checks = [*doctor.abilities_mean(worst), doctor.encryption(forgetful)]
    assert len(checks) == 6
    for check in checks:
        assert check.verdict != "good"
        assert f"| {check.name} | {check.found.partition(' (')[0]} |" in PAGE


def test_addresses_of_the_page_are_understood() -> None:
    listed = re.search(r"## Addresses\n\n```text\n(.*?)```", PAGE, re.DOTALL)
    assert listed
    addresses = listed[1].split()
    assert len(addresses) == 8
    for each in addresses:
        if each.startswith("s3:"):
            assert Address.parse(each).bucket == "bucket"
            assert Address.parse(Address.parse(each).uri) == Address.parse(each)


@in_a_folder
def test_the_code_of_the_page_runs(place: str) -> None:
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert code
    rows = finished(ResultStore.open(place, create=True))
    names: dict[str, Any] = {}
    told = code[1].replace('"results"', repr(place)).replace("quickstart", "made")
    exec(compile(told, "docs/storage.md", "exec"), names)
    assert names["trials"].column("trial_id").to_pylist() == [row.trial_id for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("minutes", [20, -20])
def test_clocks_that_are_too_far_apart_are_told_as_what_they_are(
    ceph_bucket: str, monkeypatch: pytest.MonkeyPatch, minutes: int
) -> None:
    """Once: another try would be refused as well. On moto nothing is refused, so only a real server tells."""
    now, asked = botocore.auth.get_current_datetime, list[float]()

    def shifted() -> Any:
        asked.append(time.monotonic())
        return now() + timedelta(minutes=minutes)

    monkeypatch.setattr(botocore.auth, "get_current_datetime", shifted)
    (check,) = doctor.place(ceph_bucket)
    assert (check.verdict, check.code) == ("bad", ExitCode.UNREACHABLE)
    assert "RequestTimeTooSkewed" in check.found
    assert "clocks of this machine and of the store differ" in check.found
    assert len(asked) == 1
