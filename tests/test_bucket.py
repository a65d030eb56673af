"""A bucket, by itself: how it is found, and what becomes of requests that fail, or that only seem to.

What all places have in common is in test_objects.py.
"""

import contextlib
import io
import json
import os
import pickle
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import made_tls
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore import exceptions as faults
from command_line import loaded_by
from made_ceph import Ceph
from made_rows import DEAD, ELSEWHERE, advance, begin, content, finished, keys, trial
from odd_servers import BOTH, Unconditional, Unquoted, refusal

from orchestrator import doctor
from orchestrator.errors import ExitCode, RefusedError, UnreachableError, UsageError
from orchestrator.rows import TrialRow
from orchestrator.store import LeaseLostError, ResultStore, SweepWriter
from orchestrator.store import bucket as buckets
from orchestrator.store import writer as writing
from orchestrator.store.bucket import Address, Bucket

SECRET = "hush-hush-testsecret"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_WAIT_S", "SETTLE_S"):
        monkeypatch.setattr(buckets, name, 0.0)


# ------------------------------------------------------------------------------------------------------ how it is found


def test_an_address_says_where_and_no_more() -> None:
    whole = "s3://bucket/a/b?endpoint_override=localhost:9000&scheme=http&region=eu-west-3"
    address = Address.parse(whole)
    assert address == Address("bucket", "a/b", "http://localhost:9000", "eu-west-3")
    assert (address.uri, str(address)) == (whole, "s3://bucket/a/b")
    for uri in ("s3://bucket", "s3://bucket/a/b"):
        assert (Address.parse(uri).uri, Address.parse(uri + "/").uri) == (uri, uri)
    assert Address.parse("s3://bucket/x?endpoint_override=store.example").endpoint == "https://store.example"


@pytest.mark.parametrize(
    ("uri", "match"),
    [
        (f"s3://key:{SECRET}@bucket/a", "has a user name or a password in it.*AWS_ACCESS_KEY_ID"),
        (f"s3://key:{SECRET}/more@bucket/a", "has a user name or a password"),
        (f"s3://bucket/a?endpoint_override=key:{SECRET}@host", "has a user name or a password"),
        (f"s3://bucket/a?secret_key={SECRET}", "secret_key means nothing here"),
        (f"s3://key:{SECRET}", "no name of a bucket"),
        ("s3://", "no name of a bucket"),
        ("s3:///a", "no name of a bucket"),
        ("s3://bucket/a#b", "what follows # means nothing"),
        ("s3://bucket/a?endpoint_override=http://host", "endpoint_override is host:port"),
        ("s3://bucket/a?scheme=ftp", "scheme is http or https"),
        ("s3://bucket/a?sse=on", "sse is AES256 or aws:kms"),
        ("s3://bucket/a?sse=aws:kms&sse_kms_key_id=a%20b", "the id, the ARN or the alias of a key"),
        ("s3://bucket/a?sse=AES256&sse_kms_key_id=a", "names a key of sse=aws:kms"),
        (f"s3://bucket/a?{SECRET}", r"\.\.\. means nothing here"),
        (f"s3:key:{SECRET}@bucket/a", "has a user name or a password"),
        (f"gs://key:{SECRET}@bucket/a", "at s3://bucket/prefix"),
        (f"file://key:{SECRET}@host/a", "is file:///path, with three slashes"),
        ("file://results", "is file:///path, with three slashes"),
        ("file://results/a", "is file:///path, with three slashes"),
        ("file:results", "is file:///path, with three slashes"),
        ("file:///results?region=a", "is file:///path, with three slashes"),
    ],
)
def test_an_address_that_is_none_is_refused_without_its_secrets(uri: str, match: str) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        ResultStore.open(uri)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_the_environment_names_the_server(
    bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """And a worker that has only the store's address finds it too."""
    monkeypatch.setenv(name, f"http://{s3_server}")
    store = ResultStore.open(bucket.partition("?")[0], create=True)
    monkeypatch.delenv(name)
    assert store.uri == bucket
    store.folder.put("a", b"1")
    assert ResultStore.open(store.uri).folder.names("") == ["a"]


def test_a_profile_names_the_server_and_has_the_credentials(
    bucket: str, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text(f"[profile lab]\nregion = eu-west-3\nendpoint_url = http://{s3_server}\n")
    (tmp_path / "credentials").write_text(f"[lab]\naws_access_key_id = labkey\naws_secret_access_key = {SECRET}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(UnreachableError, match="AWS_PROFILE"):
        ResultStore.open(bucket)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    found = Bucket.open(bucket.partition("?")[0])
    found.put("a.parquet", parquet([1]))
    filesystem, path = found.filesystem()
    assert pq.read_table(f"{path}/a.parquet", filesystem=filesystem).column("number").to_pylist() == [1]
    assert SECRET.encode() not in pickle.dumps(filesystem)
    assert found.uri == f"{bucket}&region=eu-west-3"
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(UsageError, match=r"settings of AWS cannot be used.*nobody"):
        Bucket.open(bucket)


def test_a_password_in_the_endpoint_of_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://key:{SECRET}@127.0.0.1:9")
    with pytest.raises(UsageError, match="AWS_ENDPOINT_URL has a user name or a password") as caught:
        Bucket.open("s3://bucket/a")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["http://store:9000/gateway", "http://store:9000?a=b", "ftp://store"])
def test_an_endpoint_that_is_more_than_a_server_is_refused(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is given the address would go to another place."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(UsageError, match="http://host:port or https://host:port"):
        ResultStore.open("s3://bucket/a")


def test_a_slash_behind_the_server_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://store:9000/")
    assert Bucket.open("s3://bucket/a").uri.startswith("s3://bucket/a?endpoint_override=store:9000&scheme=https")


def test_amazons_own_buckets_are_addressed_as_amazon_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testkey")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    here, elsewhere = (
        Bucket.open("s3://bucket/a?region=eu-west-3"),
        Bucket.open("s3://bucket/a?endpoint_override=localhost:9000&scheme=http"),
    )
    url = here._client.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "k"})
    assert re.match(r"https://bucket\.s3[.a-z0-9-]*\.amazonaws\.com/k\?", url)
    assert here._client.meta.endpoint_url == "https://s3.eu-west-3.amazonaws.com"
    url = elsewhere._client.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "k"})
    assert url.startswith("http://localhost:9000/bucket/k?")
    assert here.uri == "s3://bucket/a?region=eu-west-3"


def test_prefixes_of_one_bucket_know_nothing_of_each_other(bucket: str) -> None:
    address, _, server = bucket.partition("?")
    one, other, whole = (
        Bucket.open(f"{place}?{server}") for place in (address, f"{address}-too", address.rpartition("/some")[0])
    )
    one.put("a", b"1")
    assert (other.names(""), other.names("", folders=True)) == ([], [])
    assert (whole.names("", folders=True), whole.names("some/results")) == (["some"], ["a"])


def test_botocore_is_loaded_for_buckets_alone(tmp_path: Path) -> None:
    assert "botocore" not in loaded_by("ls", "--results", str(tmp_path))


@pytest.mark.parametrize("command", ["ls", "status made", "table made"])
def test_what_a_command_must_not_load_to_read_a_bucket(command: str, bucket: str) -> None:
    """This is what keeps it under 0.5 s of CPU (benchmarks/reading.py). It was 461 to 471 modules."""
    finished(ResultStore.open(bucket))
    loaded = loaded_by(*command.split(), "--results", bucket)
    assert {"botocore", "pyarrow.parquet"} <= loaded
    assert {"boto3", "s3transfer", "numpy", "asyncio", "orchestrator.driver"}.isdisjoint(loaded)
    assert len(loaded) < 540


# --------------------------------------------------------------------------------------- how other readers find it


def test_polars_reads_it_with_the_options_of_the_store(bucket: str) -> None:
    polars = pytest.importorskip("polars")
    made = Bucket.open(bucket)
    made.put("x/a.parquet", parquet([1, 2]))
    options = made.storage_options()
    frame = polars.read_parquet(f"{made}/x/*.parquet", storage_options=options)
    assert frame["number"].to_list() == [1, 2]
    assert options["aws_endpoint_url"] == f"http://{bucket.partition('=')[2].partition('&')[0]}"


class Role(BaseHTTPRequestHandler):
    """Gives the credentials of a role for a few minutes each, as the agent of a container does, or a machine's host."""

    asked: ClassVar[list[str]] = []

    def do_PUT(self) -> None:
        self.answer(b"permission to ask")

    def do_GET(self) -> None:
        self.asked.append(self.path)
        expires = datetime.now(UTC) + timedelta(minutes=5)
        content = json.dumps({
            "AccessKeyId": "rolekey", "SecretAccessKey": SECRET, "Token": "a-session-token", "RoleArn": "role",
            "Expiration": expires.strftime("%Y-%m-%dT%H:%M:%SZ"), "Code": "Success",
        }).encode()  # fmt: skip
        self.answer(b"role" if self.path.endswith("/security-credentials/") else content)

    def answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("X-aws-ec2-metadata-token-ttl-seconds", "21600")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture(params=["container", "machine"])
def role(request: pytest.FixtureRequest, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Whose role has the credentials, instead of keys in the environment."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    Role.asked.clear()
    with serving(Role) as address:
        if request.param == "container":
            monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://{address}/role")
        else:
            monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "false")
            monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{address}")
        yield str(request.param)


def test_the_credentials_of_a_role_are_found_and_made_anew(bucket: str, role: str) -> None:
    """A container's are asked for again with each request, since five minutes are so few; a machine's, which botocore
    believes to be good for longer, are not. Arrow asks by itself, and holds no key that could age.
    """
    made = Bucket.open(bucket)
    sent: list[str] = []
    made._client.meta.events.register("before-send.s3", lambda request, **_: sent.append(str(request.headers)))
    made.put("x/a.parquet", parquet([1, 2]))
    asked = len(Role.asked)
    assert made.read("x/a.parquet")
    assert (len(Role.asked) > asked > 0) or role == "machine"
    assert all("a-session-token" in headers for headers in sent)
    asked = len(Role.asked)
    filesystem, path = made.filesystem()
    assert pq.read_table(f"{path}/x/a.parquet", filesystem=filesystem).column("number").to_pylist() == [1, 2]
    assert len(Role.asked) > asked
    assert SECRET.encode() not in pickle.dumps(filesystem)
    assert made.storage_options()["aws_session_token"] == "a-session-token"


# ----------------------------------------------------------------------- encryption, and an authority of one's own


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("sse=AES256", {"ServerSideEncryption": "AES256"}),
        (
            "sse=aws:kms&sse_kms_key_id=arn:aws:kms:eu-west-3:111122223333:key/a-b",
            {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "arn:aws:kms:eu-west-3:111122223333:key/a-b"},
        ),
    ],
)
def test_every_object_is_encrypted_as_the_address_asks(bucket: str, asked: str, told: dict[str, str]) -> None:
    """By whatever way it was written, and by a worker that has only the store's address."""
    made = Bucket.open(ResultStore.open(f"{bucket}&{asked}", create=True).uri)
    assert made.uri.endswith(f"&{asked}")
    made.put("a", b"1")
    assert made.create("b", b"1")
    tag = made.swap("c", b"1", None)
    assert made.swap("c", b"2", tag)
    for key in ("a", "b", "c"):
        head = made._head(key)
        assert {name: head[name] for name in told} == told
    Bucket.open(bucket).put("d", b"1")
    assert made._head("d").get("ServerSideEncryption") != told["ServerSideEncryption"]  # or the above would say nothing


def test_a_store_that_does_not_encrypt_is_told(faulty: Callable[..., Bucket], bucket: str) -> None:
    made = Bucket.open(f"{bucket}&sse=AES256")
    made._client = Faulty(made._client, refusal(400, "InvalidRequest"))
    with pytest.raises(UnreachableError, match="leave sse out of the address"):
        made.put("a", b"1")


def test_an_object_that_no_server_would_take_is_not_sent(bucket: str, tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(5 * 2**30 + 1)
    with pytest.raises(UnreachableError, match=r"huge of 5,368,709,121 bytes is larger than .*in a folder"):
        Bucket.open(bucket).upload("a", tmp_path / "huge")


def test_an_authority_of_ones_own_is_believed_if_it_is_named(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with made_tls.before(bucket.partition("=")[2].partition("&")[0], tmp_path) as (address, authority):
        place = f"{bucket.partition('?')[0]}?endpoint_override={address}"
        with pytest.raises(UnreachableError, match=r"CERTIFICATE_VERIFY_FAILED.*AWS_CA_BUNDLE"):
            ResultStore.open(place)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(authority))
        made = Bucket.open(place)
        made.put("a.parquet", parquet([1]))
        filesystem, path = made.filesystem()
        assert pq.read_table(f"{path}/a.parquet", filesystem=filesystem).column("number").to_pylist() == [1]


def parquet(numbers: list[int]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"number": numbers}), file)
    return file.getvalue()


# -------------------------------------------------------------------------------------------- requests that go wrong


class Faulty:
    """A client whose requests go wrong as planned: `plan` gives what happens to each, until it is used up."""

    def __init__(self, client: Any, *plan: str | Exception) -> None:
        self._client, self.plan, self.calls = client, list(plan), 0

    def __getattr__(self, name: str) -> Any:
        request = getattr(self._client, name)
        if name not in ("put_object", "get_object", "head_object", "list_objects_v2", "delete_object"):
            return request

        def call(**given: Any) -> Any:
            self.calls += 1
            fault = self.plan.pop(0) if self.plan else ""
            if isinstance(fault, Exception):
                raise fault
            answer = request(**given)
            if fault == "reset after":
                raise faults.ConnectionClosedError(endpoint_url="http://server")
            if fault == "cut":
                answer["Body"] = Cut(answer["Body"])
            return answer

        return call


class Cut:
    def __init__(self, content: Any) -> None:
        self._content, self._cut = content, False

    def read(self, size: int) -> bytes:
        if self._cut:
            raise faults.IncompleteReadError(actual_bytes=1, expected_bytes=2)
        self._cut = True
        return bytes(self._content.read(1))

    def close(self) -> None:
        self._content.close()


RESET = faults.ConnectionClosedError(endpoint_url="http://server")
GONE = faults.EndpointConnectionError(endpoint_url="http://server")
PASSING = [refusal(503, "SlowDown"), refusal(500, "InternalError"), refusal(400, "BadDigest"), RESET, GONE]


@pytest.fixture
def faulty(bucket: str) -> Callable[..., Bucket]:
    """A bucket whose next requests go wrong as planned; that its server honours conditions is known."""

    def make(*plan: str | Exception) -> Bucket:
        made = Bucket.open(bucket)
        made._conditions()
        made._client = Faulty(made._client, *plan)
        return made

    return make


def test_what_passes_is_waited_out(faulty: Callable[..., Bucket]) -> None:
    made = faulty(*PASSING)
    made.put("a", b"1")
    assert made._client.calls == 6
    for act in (lambda: made.read("a"), lambda: made.names(""), lambda: made.digest("a"), lambda: made.modified("a")):
        made._client.plan = [refusal(503, "SlowDown"), RESET]
        assert act()
    made._client.plan = [RESET]
    made.delete("a")
    assert made.read("a") is None


def test_an_answer_that_is_cut_is_read_again_whole(faulty: Callable[..., Bucket], tmp_path: Path) -> None:
    made = faulty()
    made.put("a", b"123")
    made._client.plan = ["cut", "cut"]
    stored = made.read("a")
    assert stored is not None
    assert stored.data == b"123"
    made._client.plan = ["cut"]
    made.download("a", tmp_path / "a", lambda _: True)
    assert (tmp_path / "a").read_bytes() == b"123"


def test_an_answer_that_is_lost_is_found_out(faulty: Callable[..., Bucket]) -> None:
    """The server did it, nobody heard, and the second try finds it done already."""
    made = faulty("reset after")
    assert made.create("a", b"1")
    assert not made.create("a", b"1")
    made._client.plan = ["reset after", "", RESET]  # the look at it may fail as well: then all begins again
    tag = made.swap("b", b"1", None)
    assert tag
    made._client.plan = ["reset after", refusal(503, "SlowDown")]
    assert made.swap("b", b"2", tag) not in (None, tag)
    stored = made.read("b")
    assert stored is not None
    assert stored.data == b"2"


def test_a_lost_answer_is_no_licence_to_overwrite(faulty: Callable[..., Bucket], bucket: str) -> None:
    """Before the second try, another was sooner."""
    made, other = faulty(), Bucket.open(bucket)
    tag = made.swap("a", b"1", None)
    assert other.swap("a", b"another", tag)
    made._client.plan = [RESET]
    assert made.swap("a", b"2", tag) is None
    made._client.plan = [refusal(500, "InternalError")]
    assert not made.create("a", b"2")
    stored = made.read("a")
    assert stored is not None
    assert stored.data == b"another"


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """host:port of a server that answers so."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_lost_answer_is_not_taken_from_another_who_wrote_the_same(faulty: Callable[..., Bucket], bucket: str) -> None:
    """Its own try was never carried out."""
    made, other = faulty(RESET), Bucket.open(bucket)
    assert other.create("a", b"1")
    assert not made.create("a", b"1")


class Rude(BaseHTTPRequestHandler):
    """Hangs up before it answers, cuts its first answers short, and then behaves."""

    calls: ClassVar[list[str]] = []

    def do_PUT(self) -> None:
        self.calls.append("PUT")
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.calls.count("PUT") < 3:
            self.close_connection = True
            return
        self.answer(b"")

    def do_GET(self) -> None:
        self.calls.append("GET")
        self.answer(b"12" if self.calls.count("GET") < 3 else b"12345")

    def answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("ETag", '"tag"')
        self.send_header("Content-Length", "5" if content else "0")
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


def test_connections_that_break_are_made_anew(bucket: str) -> None:
    """Real ones: what botocore makes of them is no assumption of ours."""
    Rude.calls.clear()
    with serving(Rude) as address:
        made = Bucket.open(f"s3://bucket/a?endpoint_override={address}&scheme=http")
        made.put("a", b"12345")
        stored = made.read("a")
    assert stored is not None
    assert (stored.data, stored.tag) == (b"12345", "tag")
    assert Rude.calls == ["PUT"] * 3 + ["GET"] * 3


class Faltering(Rude):
    """Refuses for a moment, and breaks off in the middle of saying so."""

    def do_GET(self) -> None:
        self.calls.append("GET")
        if self.calls.count("GET") > 2:
            return self.answer(b"12345")
        self.send_response(503)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"<Error><Code>Slow")
        self.close_connection = True
        return None


def test_a_refusal_that_is_cut_short_is_waited_out(bucket: str) -> None:
    Faltering.calls.clear()
    with serving(Faltering) as address:
        stored = Bucket.open(f"s3://bucket/a?endpoint_override={address}&scheme=http").read("a")
    assert stored is not None
    assert (stored.data, Faltering.calls) == (b"12345", ["GET"] * 3)


def test_a_store_that_hangs_is_not_waited_for_eight_times(
    faulty: Callable[..., Bucket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "PATIENCE_S", -1.0)
    made = faulty(*[RESET] * buckets.TRIES)
    with pytest.raises(UnreachableError):
        made.read("a")
    assert made._client.calls == 3


@pytest.mark.parametrize(
    ("error", "advice", "tries"),
    [
        (refusal(403, "AccessDenied"), "allow to list the bucket", 1),
        (refusal(403, "RequestTimeTooSkewed"), "clocks", 1),
        (refusal(403, "403", date="Sat, 21 Nov 2020 12:00:00 GMT"), "clocks", 1),
        (refusal(400, "ExpiredToken"), "get new ones", 1),
        (refusal(404, "NoSuchBucket"), "Make the bucket", 1),
        (faults.NoCredentialsError(), "AWS_PROFILE", 1),
        (faults.CredentialRetrievalError(provider="role", error_msg="over"), "AWS_PROFILE", 1),
        (refusal(503, "SlowDown"), "Run the same command again", buckets.TRIES),
        (RESET, "Run the same command again", buckets.TRIES),
    ],
    ids=str,
)
def test_what_does_not_pass_says_what_to_do(
    faulty: Callable[..., Bucket], error: Exception, advice: str, tries: int
) -> None:
    made = faulty(*[error] * buckets.TRIES)
    with pytest.raises(
        UnreachableError, match=f"cannot write s3://made-.*/some/results/a: .*stored before is unharmed.*{advice}"
    ):
        made.put("a", b"1")
    assert made._client.calls == tries


def test_a_server_that_is_not_there_is_told(bucket: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"{bucket.partition('?')[0]}?endpoint_override=127.0.0.1:{taken.getsockname()[1]}&scheme=http"
        with pytest.raises(UnreachableError, match=r"cannot list .*Could not connect.*when the store answers"):
            ResultStore.open(address)


def test_a_bucket_that_is_not_there_is_told_and_not_made(bucket: str, s3_server: str) -> None:
    address = f"s3://nothing-here/a?{bucket.partition('?')[2]}"
    for create in (True, False):
        with pytest.raises(UnreachableError, match=r"NoSuchBucket.*Make the bucket"):
            ResultStore.open(address, create=create)


def test_the_doctor_tries_a_bucket(bucket: str) -> None:
    check = doctor.results_bucket(bucket)
    assert (check.verdict, check.found) == ("good", bucket.partition("?")[0])
    check = doctor.results_bucket(f"s3://nothing-here/a?{bucket.partition('?')[2]}")
    assert (check.verdict, check.code) == ("bad", ExitCode.UNREACHABLE)
    assert "Make the bucket" in check.found
    assert Bucket.open(bucket).names("") == []


def test_no_secret_is_in_an_error(faulty: Callable[..., Bucket], monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the server says it back; neither in the text, nor in a pickle, nor in what a traceback prints."""
    import traceback

    monkeypatch.setenv("SOME_API_TOKEN", "another-secret")
    error = refusal(403, "SignatureDoesNotMatch", f"the string {SECRET}, and another-secret")
    made = faulty(error)
    with pytest.raises(UnreachableError, match=r"the string \*\*\*, and \*\*\*") as caught:
        made.put("a", b"1")
    for text in (repr(pickle.dumps(caught.value)), "".join(traceback.format_exception(caught.value)), repr(vars(made))):
        assert SECRET not in text
        assert "another-secret" not in text
    assert SECRET not in made.uri


# ------------------------------------------------------------------------------------------ servers without conditions


SERVERS: dict[str, tuple[Callable[[Any], Any], bool, str | None]] = {
    "as the standard has it": (lambda client: client, True, '"{}"'),
    "without quotation marks": (Unquoted, True, "{}"),
    "forgets all": (lambda client: Unconditional(client, forgets=BOTH), False, None),
    "refuses all": (lambda client: Unconditional(client, refuses=BOTH), False, None),
    "creates, and refuses to swap": (lambda client: Unconditional(client, refuses=BOTH[1:]), True, None),
    "creates, and forgets to swap": (lambda client: Unconditional(client, forgets=BOTH[1:]), True, None),
}


@pytest.mark.parametrize("server", SERVERS)
def test_a_server_that_lacks_conditions_is_found_out_and_served(bucket: str, server: str) -> None:
    make, create, swap = SERVERS[server]
    made = Bucket.open(bucket)
    made._client = make(made._client)
    store = ResultStore(made)
    assert made.create("a", b"1")
    assert not made.create("a", b"1")
    tag = made.swap("b", b"1", None)
    assert made.swap("b", b"2", tag)
    assert made.swap("b", b"3", tag) is None
    assert made.swap("b", b"3", None) is None
    assert made._conditions() == buckets._Conditions(create, swap)
    assert made.names("") == ["a", "b"]
    rows = finished(store)
    assert keys(store) == sorted((row.trial_id, number) for row in rows for number in (1, 2, 3))
    assert store.verify("made") == []


def test_who_was_overwritten_at_the_same_moment_sees_it(bucket: str) -> None:
    made, other = Bucket.open(bucket), Bucket.open(bucket)
    client = made._client = Unconditional(made._client, forgets=BOTH)
    tag = made.swap("a", b"1", None)
    client.after = lambda: other.put("a", b"another")
    assert made.swap("a", b"2", tag) is None
    stored = made.read("a")
    assert stored is not None
    assert stored.data == b"another"


def test_of_two_drivers_that_a_server_without_conditions_let_in_one_is_told(bucket: str) -> None:
    """The first looks, is held up while the second takes the sweep and writes, and then takes it as well."""
    made, other = Bucket.open(bucket), Bucket.open(bucket)
    client = made._client = Unconditional(made._client, forgets=BOTH)
    other._client = Unconditional(other._client, forgets=BOTH)
    seconds: list[SweepWriter] = []

    def meanwhile(key: str) -> None:
        if key.endswith("lease.json") and not seconds:
            seconds.append(begin(ResultStore(other)))
            finish(seconds[0], trial(0))

    client.before = meanwhile
    first = begin(ResultStore(made), process=DEAD)
    with pytest.raises(LeaseLostError):
        seconds[0].renew()
    with pytest.raises(LeaseLostError):  # its part would have the name of one that is there: nothing is overwritten
        finish(first, trial(1))
    with begin(ResultStore(made)) as third:
        assert third.fence == 2
        assert [(row.trial_id, row.state) for row in third.rows] == [(trial(0).trial_id, "TERMINATED")]
    assert [number for _, number in keys(ResultStore(made))] == [1, 2, 3]


class KilledError(BaseException):
    """What a kill is to a driver: nothing of its own runs after it."""


@pytest.mark.parametrize("killed", [False, True], ids=["lives", "is killed"])
@pytest.mark.parametrize("ended", [False, True], ids=["later one runs", "later one has ended"])
def test_what_a_stale_driver_overwrites_is_not_read_and_is_put_right(
    bucket: str, killed: bool, ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is held up between its look at the trials and its write, on a server that forgets conditions."""
    monkeypatch.setattr(writing, "LOOK_S", 0.0)
    made, other = Bucket.open(bucket), Bucket.open(bucket)
    client = made._client = Unconditional(made._client, forgets=BOTH)
    other._client = Unconditional(other._client, forgets=BOTH)
    store, later = ResultStore(other), list[SweepWriter]()
    stale = begin(ResultStore(made), process=DEAD)

    def meanwhile(key: str) -> None:
        if key.endswith("/trials.parquet") and not later:
            later.append(begin(store))
            finish(later[0], trial(0), attempt=2)
            if ended:
                later[0].close(done=True)
            client.after = land

    def land() -> None:
        client.after = lambda: None
        assert states_of_the_object(store) == ["RUNNING"]  # it did land
        if killed:
            raise KilledError

    client.before = meanwhile
    advance(stale, trial(0), 1, seq=1)
    with pytest.raises(KilledError) if killed else contextlib.nullcontext():
        stale.flush(force=True)
    if not killed:
        with pytest.raises(LeaseLostError):
            stale.renew()
    assert [row.state for row in store.trial_rows("made")] == ["TERMINATED"]
    if ended:
        begin(store).close(done=True)
    else:
        later[0].flush()  # with nothing new to say
        later[0].close(done=True)
    assert states_of_the_object(store) == ["TERMINATED"]
    assert [row.state for row in store.trial_rows("made")] == ["TERMINATED"]
    assert [number for _, number in keys(store)] == [1, 2, 3]
    assert store.verify("made") == []


@pytest.mark.parametrize("killed", [False, True], ids=["lives", "is killed"])
def test_a_result_that_an_old_driver_writes_during_a_take_over_is_taken_in(bucket: str, killed: bool) -> None:
    """The new one has read the trials and not yet written its own, on a server that forgets conditions."""
    made, other = Bucket.open(bucket), Bucket.open(bucket)
    client = made._client = Unconditional(made._client, forgets=BOTH)
    other._client = Unconditional(other._client, forgets=BOTH)
    old, store = begin(ResultStore(other), process=DEAD), ResultStore(made)
    ended = list[str]()

    def meanwhile(key: str) -> None:
        if "/epochs/live-2" in key and not ended:
            finish(old, trial(0))
            ended.append(key)
        elif ended and killed and key.endswith("/trials.parquet"):
            raise KilledError

    client.before = meanwhile
    with pytest.raises(KilledError) if killed else contextlib.nullcontext():
        begin(store, process=DEAD)
    client.before = lambda key: None
    assert [row.state for row in store.trial_rows("made")] == ["TERMINATED"]
    with begin(store) as writer:
        assert [row.state for row in writer.rows] == ["TERMINATED"]
    assert [number for _, number in keys(store)] == [1, 2, 3]
    assert store.verify("made") == []


def states_of_the_object(store: ResultStore) -> list[str]:
    """As a reader sees them that knows nothing of us."""
    table = pq.read_table(io.BytesIO(content(store, "sweeps/made/trials.parquet")))
    return [str(state) for state in table.column("state").to_pylist()]


def test_a_second_driver_is_refused_also_where_conditions_are_forgotten(bucket: str) -> None:
    made = Bucket.open(bucket)
    made._client = Unconditional(made._client, forgets=BOTH)
    with begin(ResultStore(made), process=ELSEWHERE) as first:
        with pytest.raises(RefusedError, match="heard of"):
            begin(ResultStore(made))
        first.renew()
        finish(first, trial(0))


def finish(writer: SweepWriter, row: TrialRow, attempt: int = 1) -> None:
    for number in (1, 2, 3):
        row = advance(writer, row, number, seq=number, attempt=attempt)
    writer.flush(force=True)


def test_a_file_that_cannot_be_read_is_told(bucket: str, tmp_path: Path) -> None:
    made = Bucket.open(bucket)
    with pytest.raises(UnreachableError, match=r"cannot read .*nothing"):
        made.upload("a", tmp_path / "nothing")
    made.put("a", b"1")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UnreachableError, match=r"cannot write .*file/a: "):
        made.download("a", tmp_path / "file" / "a", lambda _: True)
    assert os.listdir(tmp_path) == ["file"]


# ----------------------------------------------------------------------------------------- a real server that goes away


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_a_server_that_goes_away_and_comes_back_loses_nothing(
    ceph_server: Ceph, ceph_bucket: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What four threads count meanwhile is right to the last one, though some of their answers are lost."""
    monkeypatch.setattr(buckets, "FIRST_WAIT_S", 0.1)
    monkeypatch.setattr(buckets, "ANSWER_S", 2)
    made = Bucket.open(ceph_bucket)
    made.put("count", b"0")
    begun = threading.Barrier(5)

    def count(thread: int) -> None:
        begun.wait()
        for number in range(20):
            assert made.create(f"{thread}/{number}", b"1")
            while True:
                stored = made.read("count")
                assert stored is not None
                if made.swap("count", b"%d" % (int(stored.data) + 1), stored.tag):
                    break

    with ThreadPoolExecutor(4) as pool:
        counts = [pool.submit(count, thread) for thread in range(4)]
        begun.wait()
        for _ in range(2):
            time.sleep(0.1)
            (ceph_server.kill_gateway if how == "killed" else ceph_server.freeze)()
            time.sleep(0.3 if how == "killed" else 3.0)
            (ceph_server.start_gateway if how == "killed" else ceph_server.thaw)()
        for each in counts:
            each.result()
    stored = made.read("count")
    assert stored is not None
    assert stored.data == b"80"
