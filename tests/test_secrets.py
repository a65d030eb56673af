"""Secrets that are planted, and must come out nowhere: on no stream, in no object, in no error and in no pickle."""

import io
import json
import logging
import pickle
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from command_line import Mixmo
from made_bucket import SECRET
from made_rows import finished, trial

from orchestrator import cli
from orchestrator.cli.guard import guarded
from orchestrator.errors import ExitCode
from orchestrator.store import ResultStore
from orchestrator.store.bucket import Bucket

TOKEN = "hush-hush-testtoken"
PASSWORD = "hush-hush-testpassword"
ADDRESSES = [
    "s3://key:{}@bucket/a", "s3:/key:{}@bucket/a", "s3:key:{}@bucket/a", "s3://bucket/a?{}", "gs://key:{}@bucket",
    "https://key:{}@host/bucket", "file://user:{}@host/a",
]  # fmt: skip
COMMANDS = [
    "ls", "status made", "table made", "verify made", "show abc", "logs abc", "plan sweep.yaml", "run sweep.yaml --yes",
]  # fmt: skip
SWEEP = "name: made\ntrial: {data: {dataset: synthetic}, optim: {epochs: 1}}\n"


@pytest.fixture
def planted(bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket whose credentials have a session token too, which moto does not look at."""
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    return bucket


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_password_in_an_address_is_refused_and_never_said(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Given to any command, or by the environment, also to one that only shows its help."""
    monkeypatch.chdir(tmp_path)
    Path("sweep.yaml").write_text(SWEEP)
    place = address.format(PASSWORD)
    for command in COMMANDS:
        assert ended(*command.split(), "--results", place) == ExitCode.USAGE
    assert ended("doctor", "--json", "--results", place) == ExitCode.USAGE
    monkeypatch.setenv("MIXMO_RESULTS", place)
    assert ended("ls") == ExitCode.USAGE
    assert ended("ls", "--help") == ExitCode.OK
    out, err = capfd.readouterr()
    assert "--results PLACE" in out
    assert PASSWORD not in out + err
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]


def ended(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(words))
    return int(caught.value.code or 0)


def test_the_doctor_says_no_secret(
    planted: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ended("doctor", "--json", "--results", planted)
    out, err = capfd.readouterr()
    assert "second driver" in {check["name"] for check in json.loads(out)["checks"]}
    assert not told(out + err)


def test_no_object_of_a_store_holds_a_secret(planted: str) -> None:
    """Not as it is, and not inside a table that is compressed."""
    store = ResultStore.open(planted, create=True)
    finished(store)
    store.attempt("ab" * 6, 1, 1, "t").put_log(0, f"printed {SECRET} and {TOKEN}")
    with store.writer("failed", sweep_text="name: failed\n") as writer:
        told_by_a_library = f"cannot sign with {SECRET}, {TOKEN}"
        writer.put([trial(state="ERROR", error=told_by_a_library, error_cause=told_by_a_library)])
        writer.event("lost", told_by_a_library, cause=told_by_a_library)
    assert [row.error for row in store.trial_rows("failed")] == ["cannot sign with ***, ***"]
    sizes = store.folder.sizes("")
    assert any(key.endswith(".parquet") for key in sizes)
    for key in sizes:
        stored = store.folder.read(key)
        assert stored is not None
        text = stored.data.decode(errors="replace")
        if key.endswith(".parquet"):
            table = pq.read_table(io.BytesIO(stored.data))
            text += str(table.to_pylist()) + str(table.schema.metadata)
        assert not told(text), key


def test_a_gangs_log_hides_what_a_profile_gave(planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment has nothing of it."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text(
        f"[default]\naws_access_key_id = key\naws_secret_access_key = {SECRET}\naws_session_token = {TOKEN}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    store = ResultStore.open(planted, create=True)
    store.attempt("ab" * 6, 1, 1, "t").put_log(0, f"a library printed {SECRET}, then {TOKEN}.")
    assert store.log("ab" * 6) == "a library printed ***, then ***."


def test_what_goes_to_another_process_has_no_secret(planted: str) -> None:
    store = ResultStore.open(planted, create=True)
    for pickled in (pickle.dumps(store), pickle.dumps(store.folder)):
        assert not told(pickled.decode(errors="replace"))
    again = pickle.loads(pickle.dumps(store))
    again.folder.put("a", b"1")
    assert store.folder.names("") == ["a"]
    assert not told(store.uri + str(store) + repr(store.folder) + repr(vars(store.folder)))


def test_the_secret_key_is_in_no_log_of_a_request(planted: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever has botocore log everything gets session tokens, which it sends; the key itself it never sends."""
    # Ray's AWS provider, once it is imported, lets botocore say no more than warnings.
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, "botocore"):
        Bucket.open(planted).put("a", b"1")
    assert len(caplog.records) > 10
    assert SECRET not in caplog.text


def test_a_bug_is_told_without_secrets(planted: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Its traceback is what people paste into a report."""

    def broken() -> None:
        raise RuntimeError(f"no rule for {SECRET}")

    assert guarded(broken) == ExitCode.BUG
    err = capfd.readouterr().err
    assert "RuntimeError: no rule for ***" in err
    assert not told(err)


@pytest.mark.slow
def test_the_command_line_says_no_secret(planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, with a server that is not there and one that is."""
    monkeypatch.setenv("MIXMO_RESULTS", planted)
    mixmo = Mixmo(tmp_path / "here", SWEEP)
    plan, nothing = mixmo("plan", "sweep.yaml"), mixmo("status", "nothing", code=5)
    monkeypatch.setenv("MIXMO_RESULTS", "s3://bucket/a?endpoint_override=127.0.0.1:9&scheme=http")
    away = mixmo("ls", code=7)
    assert "Could not connect" in away.stderr
    assert not told("".join(each.stdout + each.stderr for each in (plan, nothing, away)))


def told(text: str) -> bool:
    return any(secret in text for secret in (SECRET, TOKEN, PASSWORD))


def test_no_key_is_in_the_environment_that_ray_writes_down_of_a_proxy(planted: str) -> None:
    """Tune gives its trials the keys of AWS as a runtime environment, and Ray logs those."""
    from ray.tune.execution.class_cache import _ActorClassCache

    from orchestrator.tune import Proxy

    options = _ActorClassCache().get(Proxy)._default_options
    assert "env_vars" in str(options)  # else Ray has another way by now, to be looked at
    assert not told(str(options))
