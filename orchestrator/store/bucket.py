"""Objects in a bucket of S3 or of a server that speaks its protocol. Loads boto3's client, out of
botocore: only a store in a bucket does. The rest of boto3, managers of transfers and resources, would be a sixth of the
time of a command that reads.

Every request is tried again here and not in botocore, because only who counts the tries knows that "it exists already"
may be the answer to an earlier try of its own, whose answer was lost. Then the object itself tells.
"""

import base64
import contextlib
import functools
import hashlib
import io
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit

import botocore.exceptions as faults
import botocore.session
import urllib3.exceptions
from botocore.config import Config

from orchestrator.errors import UnreachableError, UsageError
from orchestrator.store.attempts import without_secrets
from orchestrator.store.objects import Change, Objects, Stored

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

TRIES = 8
"""How often a request is made before the store counts as away."""
PATIENCE_S = 40.0
"""Where tries take long, a request is not made again after this; but three times in any case."""
FIRST_WAIT_S = 0.1
"""The longest wait before the second try. It doubles from try to try, up to LONGEST_WAIT_S."""
LONGEST_WAIT_S = 5.0
CONNECT_S, ANSWER_S = 5, 20
"""How long one try waits for a connection, and for anything to come over it."""
LARGEST = 5 * 2**30
"""Bytes of an object that is sent whole. Sent in pieces, Ceph 16 forgets that it must not replace another."""
MARK = "mixmo-write"
"""The name under which an object tells which write made it."""
SETTLE_S = 0.5
"""How long one waits to see whether another wrote at the same moment, on a server that cannot rule it out."""

PASSING = frozenset({
    "BadDigest", "ConditionalRequestConflict", "OperationAborted", "RequestTimeout", "SlowDown", "Throttling",
    "ThrottlingException", "TooManyRequestsException",
})  # fmt: skip
"""Refusals that are worth another try, besides all with a status of 500 or above but 501."""
ADVICE: Mapping[str, str] = {
    "NoSuchBucket": "Make the bucket, or name another one with --results or MIXMO_RESULTS",
    "RequestTimeTooSkewed": "The clocks of this machine and of the store differ by many minutes: set this machine's",
    "ExpiredToken": "The session token of the credentials is over: get new ones and run the same command again",
    "InvalidToken": "The session token is not the one that belongs to the keys",
    "credentials": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run where a role gives them",
    "refused": (
        "The credentials (of the environment, of the profile, or of the machine's role) must be the right ones, and "
        "allow to list the bucket and to get, put and delete its objects"
    ),
    "encryption": "Does this store encrypt when asked to? Some do over https alone; else leave sse out of the address",
    "certificate": "If the store's certificate is of a CA of your own, name its file with AWS_CA_BUNDLE; "
    "if it speaks http, add scheme=http to the address",
    "away": "Run the same command again when the store answers",
}
_CUT = (
    faults.HTTPClientError, faults.IncompleteReadError, faults.ResponseStreamingError, faults.ReadTimeoutError,
    faults.EndpointConnectionError, faults.ConnectTimeoutError, faults.ProxyConnectionError,
    urllib3.exceptions.HTTPError,  # of a refusal whose text is cut: botocore lets it through as it is
)  # fmt: skip
"""A connection that was not made or did not last: the server may be on its way up again."""
_NO_CREDENTIALS = (
    faults.NoCredentialsError, faults.PartialCredentialsError, faults.CredentialRetrievalError,
    faults.TokenRetrievalError, faults.SSOError,
)  # fmt: skip
SKEW_S = 600.0
"""Servers refuse what is signed by a clock that differs from theirs by 15 minutes."""
_FOUND_BY_ARROW = frozenset({
    "env", "shared-credentials-file", "config-file", "container-role", "iam-role", "assume-role-with-web-identity",
})  # fmt: skip
"""Where botocore says that credentials come from, and Arrow looks too. It makes those of roles anew itself."""
_AMAZON = re.compile(r"\.amazonaws\.com(\.cn)?$")
"""How Amazon's endpoints end. Other servers are addressed by path."""
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Address:
    """A bucket, and what of it a URI may say: `s3://bucket/prefix?endpoint_override=host:port&scheme=http&region=...`.

    What the URI leaves out, the environment and the profile say (AWS_ENDPOINT_URL and its like).
    """

    bucket: str
    prefix: str
    endpoint: str | None = None
    """With its scheme. None is Amazon's, or the environment's."""
    region: str | None = None
    sse: str | None = None
    """How the server is asked to encrypt: AES256 or aws:kms. None leaves it to the bucket's own rule."""
    sse_kms_key_id: str | None = None
    """Which key of aws:kms, which is a name and no secret. None is the account's own for S3."""

    @classmethod
    def parse(cls, uri: str) -> Self:
        """Raises UsageError, with nothing in it of what may be a secret."""
        if "@" in uri:
            raise UsageError(
                "the address of the results has a user name or a password in it (or an @ elsewhere). Leave it out. "
                + ADVICE["credentials"]
            )
        parts = urlsplit(uri)
        given = dict(parse_qsl(parts.query, keep_blank_values=True))
        unknown = sorted(given.keys() - _SAID.keys())
        if unknown or parts.fragment:
            # What stands alone, or looks like no name, may be a key.
            told = [name if re.fullmatch(r"[a-z_]+", name) and given[name] else "..." for name in unknown]
            raise UsageError(f"s3://...: {' '.join(told) or 'what follows #'} means nothing here. {_FORM}")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", parts.netloc):
            raise UsageError(f"s3://...: what follows is no name of a bucket. {_FORM}")
        for name, value in given.items():
            form, meaning = _SAID[name]
            if not re.fullmatch(form, value):
                raise UsageError(f"s3://{parts.netloc}: {name} is {meaning}. {_FORM}")
        if "sse_kms_key_id" in given and given.get("sse") != "aws:kms":
            raise UsageError(f"s3://{parts.netloc}: sse_kms_key_id names a key of sse=aws:kms, which is not asked for")
        scheme, host = given.pop("scheme", "https"), given.pop("endpoint_override", None)
        return cls(parts.netloc, parts.path.strip("/"), f"{scheme}://{host}" if host else None, **given)

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def uri(self) -> str:
        where = urlsplit(self.endpoint) if self.endpoint else None
        said = {"endpoint_override": where.netloc, "scheme": where.scheme} if where else {}
        for name in ("region", "sse", "sse_kms_key_id"):
            said |= {name: getattr(self, name)} if getattr(self, name) else {}
        query = urlencode(said, safe=":[]/")
        return f"{self}?{query}" if query else str(self)


_SAID: Mapping[str, tuple[str, str]] = {
    "endpoint_override": (r"[\w.-]+(:\d+)?|\[[\da-f:]+\](:\d+)?", "host:port"),
    "scheme": ("https?", "http or https"),
    "region": (r"[\w-]+", "a name such as eu-west-3"),
    "sse": ("AES256|aws:kms", "AES256 or aws:kms"),
    "sse_kms_key_id": (r"[\w:/-]+", "the id, the ARN or the alias of a key"),
}
"""What a URI may say after its `?`, in which form."""
_FORM = (
    "An address reads s3://bucket/prefix?endpoint_override=host:port&scheme=http&region=name&sse=AES256; "
    "docs/storage.md has more"
)


@dataclass(frozen=True, slots=True)
class _Body:
    """What a request sends, from memory or from a file of any size; it may be sent again."""

    source: bytes | Path
    md5: str
    mark: str
    """Of this write alone, and stored with the object: another may have the same content."""

    @classmethod
    def of(cls, source: bytes | Path) -> Self:
        md5 = hashlib.md5(usedforsecurity=False)
        with _opened(source) as file:
            if (size := file.seek(0, io.SEEK_END)) > LARGEST:
                what = source if isinstance(source, Path) else "an object"
                raise UnreachableError(
                    f"{what} of {size:,} bytes is larger than the {LARGEST:,} that S3 takes as one, and nothing of "
                    f"mixmo's is sent in pieces. Keep results of such networks in a folder (--results)"
                )
            file.seek(0)
            while chunk := file.read(1 << 20):
                md5.update(chunk)
        return cls(source, base64.b64encode(md5.digest()).decode(), secrets.token_hex(8))


def _opened(source: bytes | Path) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")


@dataclass(frozen=True, slots=True)
class _Conditions:
    """Which conditions of a write this server honours, as far as one who is alone can find out."""

    create: bool
    """If-None-Match: * keeps what is there."""
    swap: str | None
    """How If-Match wants the tag (`{}` or `"{}"`); None where it does not keep what has changed."""


class Bucket(Objects):
    """Objects under a prefix of a bucket. Threads may share it."""

    def __init__(self, address: Address, session: Any, client: Any, authorities: str | None) -> None:
        """`authorities` is the file of a CA of one's own: AWS_CA_BUNDLE, or `ca_bundle` of the profile."""
        self.address, self._session, self._client, self._authorities = address, session, client, authorities
        self._root = f"{address.prefix}/" if address.prefix else ""
        asked = {"ServerSideEncryption": address.sse, "SSEKMSKeyId": address.sse_kms_key_id}
        self._encryption = {name: value for name, value in asked.items() if value}
        self._found: _Conditions | None = None
        self._finding = threading.Lock()

    @classmethod
    def open(cls, uri: str) -> Self:
        """Of a URI and the environment, which is read here and nowhere else. Raises UsageError, UnreachableError."""
        address = Address.parse(uri)
        try:
            session = botocore.session.get_session()
            region, authorities = map(session.get_config_variable, ("region", "ca_bundle"))
            address = replace(address, region=address.region or region)
            client = _client(session, address)
        except (faults.BotoCoreError, ValueError) as error:  # no such profile, a file that cannot be parsed, no URL
            text = without_secrets(str(error), os.environ)
            raise UsageError(f"{address}: the settings of AWS cannot be used: {text}") from None
        endpoint = str(client.meta.endpoint_url)
        if address.endpoint is None and not _AMAZON.search(endpoint):  # the environment or the profile names a server
            if "@" in endpoint:
                raise UsageError("AWS_ENDPOINT_URL has a user name or a password in it. " + ADVICE["credentials"])
            where = urlsplit(endpoint)
            if where.scheme not in ("http", "https") or where.path.strip("/") or where.query or where.fragment:
                raise UsageError(  # what a worker is told has no more than these, and it would go elsewhere
                    "AWS_ENDPOINT_URL, or the profile's endpoint_url, is a server: http://host:port or "
                    "https://host:port, and nothing behind that"
                )
            address = replace(address, endpoint=f"{where.scheme}://{where.netloc}")
            client = _client(session, address)
        return cls(address, session, client, authorities)

    def __reduce__(self) -> tuple[Callable[[str], "Bucket"], tuple[str]]:
        """A pickle has the address alone: who loads it finds the credentials as this process did."""
        return type(self).open, (self.uri,)

    def __str__(self) -> str:
        return str(self.address)

    @property
    def uri(self) -> str:
        """With the endpoint and the region that were found, so that a worker elsewhere finds the same."""
        return self.address.uri

    def filesystem(self) -> "tuple[FileSystem, str]":
        """With explicit keys only where Arrow would not find the same ones: those of a login or of an assumed role.
        They are good for an hour or less, so ask for a file system when you read and not long before.
        """
        from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

        where = urlsplit(self.address.endpoint) if self.address.endpoint else None
        made = S3FileSystem(
            region=self._client.meta.region_name,
            endpoint_override=where.netloc if where else None,
            scheme=where.scheme if where else "https",
            retry_strategy=AwsStandardS3RetryStrategy(max_attempts=TRIES),
            connect_timeout=CONNECT_S,
            request_timeout=ANSWER_S,
            **self._keys(),
            **({"tls_ca_file_path": self._authorities} if self._authorities else {}),
        )
        return made, f"{self.address.bucket}/{self.address.prefix}".rstrip("/")

    def storage_options(self) -> dict[str, str]:
        """The same for polars and others that read with Rust's object_store: `aws_region` and its like.

        The keys are in it where there are any; those of a role are good for minutes to hours.
        """
        held = self._credentials()
        found = {
            "aws_region": self._client.meta.region_name,
            "aws_endpoint_url": self.address.endpoint,
            "aws_virtual_hosted_style_request": None if self.address.endpoint is None else "false",
            "aws_allow_http": "true" if str(self.address.endpoint).startswith("http://") else None,
            "aws_access_key_id": held.access_key if held else None,
            "aws_secret_access_key": held.secret_key if held else None,
            "aws_session_token": held.token if held else None,
        }
        return {name: value for name, value in found.items() if value is not None}

    def _keys(self) -> dict[str, str]:
        held = self._credentials(but=_FOUND_BY_ARROW)
        token = {"session_token": held.token} if held and held.token else {}
        return {"access_key": held.access_key, "secret_key": held.secret_key, **token} if held else {}

    def _credentials(self, but: Collection[str] = ()) -> Any:
        """As they are now; None where there are none, or they come from where `but` says.

        Raises UnreachableError where a role or a login does not give them.
        """
        try:
            return _frozen(self._session, but)
        except faults.BotoCoreError as error:
            raise self._explained("read", "", error) from None

    # ---- the contract

    @property
    def secrets(self) -> list[str]:
        """Of the credentials as they are now, which a profile or a role may have given."""
        try:
            held = _frozen(self._session)
        except faults.BotoCoreError:  # those of a role or a login that are over and do not come anew
            return []
        return [each for each in (held.secret_key, held.token) if each] if held else []

    def read(self, key: str) -> Stored | None:
        file = io.BytesIO()
        found = self._ask("read", key, lambda: self._copy(key, file))
        return Stored(file.getvalue(), found.tag) if found else None

    def changed(self, key: str, mark: str | None) -> Change | None:
        file = io.BytesIO()
        condition = {"IfNoneMatch": f'"{mark}"'} if mark else {}
        found = self._ask("read", key, lambda: self._copy(key, file, **condition))
        now = found.tag if found else ""
        if now == mark:  # not modified; or the server knows no condition, and sent it again
            return None
        return Change(Stored(file.getvalue(), now) if found else None, now)

    def put(self, key: str, data: bytes) -> None:
        body = _Body.of(data)
        self._ask("write", key, lambda: self._send(key, body))

    def create(self, key: str, data: bytes) -> bool:
        return self._make(key, _Body.of(data))

    def upload(self, key: str, source: Path) -> bool:
        try:
            return self._make(key, _Body.of(source))
        except OSError as error:
            raise UnreachableError(f"cannot read {source}: {error.strerror}") from error

    def download(self, key: str, local: Path, accept: Callable[[str], bool]) -> str | None:
        temporary = local.with_name(f".{local.name}.{secrets.token_hex(6)}.tmp")
        try:
            local.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("w+b") as file:
                found = self._ask("read", key, lambda: self._copy(key, file))
            if found and accept(found.digest):
                os.replace(temporary, local)
        except OSError as error:
            raise UnreachableError(f"cannot write {local}: {error.strerror}. Make room there and try again") from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return found.digest if found else None

    def digest(self, key: str) -> str | None:
        found = self._ask("read", key, lambda: self._copy(key, None))
        return found.digest if found else None

    def swap(self, key: str, data: bytes, tag: str | None) -> str | None:
        body, swaps = _Body.of(data), self._conditions().swap
        if swaps is None:  # then it may not be held to If-None-Match either when several write at once, as Swift is not
            return self._place_watching(key, body, tag)
        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": swaps.format(tag)}
        return self._send_if(key, body, **condition)

    @property
    def atomic(self) -> bool:
        return self._conditions().swap is not None

    def delete(self, key: str) -> None:
        self._ask("delete", key, lambda: self._client.delete_object(**self._named(key)))

    def names(self, prefix: str, *, folders: bool = False) -> list[str]:
        start = self._start(prefix)
        found: list[str] = []
        for page in self._pages(prefix, Delimiter="/"):
            if folders:
                found += [each["Prefix"].removeprefix(start).rstrip("/") for each in page.get("CommonPrefixes", ())]
            else:
                found += [each["Key"].removeprefix(start) for each in page.get("Contents", ())]
        return sorted(name for name in found if name and not name.startswith("."))

    def sizes(self, prefix: str) -> dict[str, int]:
        objects = [each for page in self._pages(prefix) for each in page.get("Contents", ())]
        found = {each["Key"].removeprefix(self._root): int(each["Size"]) for each in objects}
        return {key: size for key, size in sorted(found.items()) if not re.search(r"(^|/)\.|/$", key)}

    def modified(self, key: str) -> float:
        head = self._ask("read", key, lambda: self._head(key))
        return float(head["LastModified"].timestamp()) if head else 0.0

    def clock(self, key: str) -> float:
        """Of a small object beside the key, since not every server dates its answers."""
        beside = f"{key.rpartition('/')[0]}/.clock-{secrets.token_hex(6)}".lstrip("/")
        self.put(beside, b"")
        try:
            return self.modified(beside)
        finally:
            self.delete(beside)

    def encrypts(self) -> bool:
        """Whether the server says of an object that it encrypted it as the address asks: some forget that silently."""
        key = f".probe-{secrets.token_hex(6)}"
        self.put(key, b"mixmo")
        try:
            head = self._ask("read", key, lambda: self._head(key))
            return head is not None and head.get("ServerSideEncryption") == self.address.sse
        finally:
            self.delete(key)

    def tidy(self, prefix: str) -> None:
        """Nothing to do: an object that was not written whole is not there."""

    def probe(self) -> None:
        key = f".probe-{secrets.token_hex(6)}"
        self.put(key, b"mixmo")
        self.delete(key)

    # ---- requests

    def _start(self, prefix: str) -> str:
        return f"{self._root}{prefix}/" if prefix else self._root

    def _pages(self, prefix: str, **wanted: str) -> Iterator[dict[str, Any]]:
        """The pages of a listing."""
        listing: dict[str, Any] = {"Bucket": self.address.bucket, "Prefix": self._start(prefix), **wanted}
        while True:
            page = self._ask("list", prefix, functools.partial(self._client.list_objects_v2, **listing))
            yield page
            if not page.get("IsTruncated"):
                return
            listing["ContinuationToken"] = page["NextContinuationToken"]

    def _named(self, key: str) -> dict[str, str]:
        return {"Bucket": self.address.bucket, "Key": self._root + key}

    def _send(self, key: str, body: _Body, **condition: str) -> str:
        """One request. The tag of what was written."""
        marked = {"Metadata": {MARK: body.mark}, **self._encryption, **condition}
        with _opened(body.source) as file:
            answer = self._client.put_object(**self._named(key), Body=file, ContentMD5=body.md5, **marked)
        return _bare(answer["ETag"])

    def _copy(self, key: str, file: BinaryIO | None, **condition: str) -> "_Copied | None":
        """One request: the content, into a file from its start if there is one to fill. Nothing is copied of an object
        that is as a condition says it is known.
        """
        try:
            answer = self._client.get_object(**self._named(key), **condition)
        except faults.ClientError as error:
            if _code(error) in ("NoSuchKey", "404"):
                return None
            if _status(error) == 304:
                return _Copied("", condition["IfNoneMatch"].strip('"'))
            raise
        sha256 = hashlib.sha256()
        if file is not None:
            file.seek(0)
            file.truncate()
        with contextlib.closing(answer["Body"]) as content:
            while chunk := content.read(1 << 20):
                sha256.update(chunk)
                if file is not None:
                    file.write(chunk)
        return _Copied(sha256.hexdigest(), _bare(answer["ETag"]))

    def _head(self, key: str) -> Any:
        try:
            return self._client.head_object(**self._named(key))
        except faults.ClientError as error:
            if _status(error) == 404:
                return None
            raise

    def _ask(self, verb: str, key: str, request: Callable[[], _T]) -> _T:
        """What the request gives, which may be made several times: its failures that pass are waited out."""
        began, tried = time.monotonic(), 0
        while True:
            try:
                return request()
            except (faults.BotoCoreError, faults.ClientError, urllib3.exceptions.HTTPError) as error:
                tried += 1
                enough = tried >= TRIES or (tried >= 3 and time.monotonic() - began > PATIENCE_S)
                if enough or not _passes(error):
                    raise self._explained(verb, key, error) from None  # its chain may hold what a message must not
            time.sleep(random.uniform(0.5, 1.0) * min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (tried - 1)))

    # ---- writing under a condition

    def _make(self, key: str, body: _Body) -> bool:
        if self._conditions().create:
            return self._send_if(key, body, IfNoneMatch="*") is not None
        return self._place_watching(key, body, None) is not None

    def _send_if(self, key: str, body: _Body, **condition: str) -> str | None:
        """Write under a condition that the server honours. The new tag; None where the condition does not hold."""
        doubtful = False  # whether an earlier try may have been carried out

        def request() -> str | None:
            nonlocal doubtful
            try:
                return self._send(key, body, **condition)
            except faults.ClientError as error:
                if _status(error) == 412 or _code(error) == "NoSuchKey":
                    return self._own(key, body) if doubtful else None
                doubtful = doubtful or _status(error) >= 500
                raise
            except (faults.BotoCoreError, urllib3.exceptions.HTTPError):
                doubtful = True
                raise

        return self._ask("write", key, request)

    def _place_watching(self, key: str, body: _Body, tag: str | None) -> str | None:
        """As `_send_if`, for a server without such conditions: look, write, and look whether it stayed.

        Of two who write at one moment the later one wins, and the earlier sees it. One who is held up for longer than
        SETTLE_S between looking and writing overwrites all the same; who was overwritten is told by its next swap.
        """
        head = self._ask("read", key, lambda: self._head(key))
        if (_bare(head["ETag"]) if head else None) != tag:
            return None
        self._ask("write", key, lambda: self._send(key, body))
        time.sleep(SETTLE_S)
        return self._ask("read", key, lambda: self._own(key, body))

    def _own(self, key: str, body: _Body) -> str | None:
        """The tag of the object if it was written by this write."""
        head = self._head(key)
        return _bare(head["ETag"]) if head and head["Metadata"].get(MARK) == body.mark else None

    def _conditions(self) -> _Conditions:
        with self._finding:
            if self._found is None:
                key = f".probe-{secrets.token_hex(6)}"
                self.put(key, b"mixmo")
                try:
                    self._found = self._try_conditions(key)
                finally:
                    self.delete(key)
            return self._found

    def _try_conditions(self, key: str) -> _Conditions:
        """On an object of ours. Some servers refuse a condition, others forget it silently."""

        def holds(**condition: str) -> bool | None:
            """None where the server knows no such condition."""
            try:
                return self._send_if(key, _Body.of(b"mixmo"), **condition) is not None
            except _UnknownError:
                return None

        create = holds(IfNoneMatch="*") is False
        if holds(IfMatch='"0123456789abcdef0123456789abcdef"') is not False:
            return _Conditions(create, None)
        head = self._ask("read", key, lambda: self._head(key))
        tag = _bare(head["ETag"]) if head else None
        forms = ['"{}"', "{}"]  # as the standard has it, and as Ceph 16 wants it
        return _Conditions(create, next((form for form in forms if tag and holds(IfMatch=form.format(tag))), None))

    # ---- failures

    def _cause(self, error: Exception) -> str:
        """Under which ADVICE tells what to do."""
        status, code = _status(error), _code(error)
        if code in ADVICE:
            return code
        if status in (401, 403):  # an answer without content says no code, and may mean the clocks all the same
            return "RequestTimeTooSkewed" if abs(_ahead_s(error)) > SKEW_S else "refused"
        if status in (400, 501) and self._encryption:
            return "encryption"
        if isinstance(error, faults.SSLError):
            return "certificate"
        return "credentials" if isinstance(error, _NO_CREDENTIALS) else "away"

    def _explained(self, verb: str, key: str, error: Exception) -> UnreachableError:
        what = str(error)
        if isinstance(error, faults.ClientError):
            what = f"{_code(error)}: {error.response.get('Error', {}).get('Message') or f'status {_status(error)}'}"
        text = f"cannot {verb} {self}/{key}: {what.rstrip('.')}. What was stored before is unharmed. "
        text += ADVICE[self._cause(error)] + "."
        for secret in self.secrets:
            text = text.replace(secret, "***")
        unknown = _code(error) in ("NotImplemented", "InvalidArgument")
        return (_UnknownError if unknown else UnreachableError)(without_secrets(text, os.environ))


@dataclass(frozen=True, slots=True)
class _Copied:
    digest: str
    tag: str


class _UnknownError(UnreachableError):
    """The server does not know what was asked of it."""


def _client(session: Any, address: Address) -> Any:
    """Checksums only where they are a must: some servers take no others, and Content-MD5 guards what we write."""
    elsewhere = address.endpoint is not None and not _AMAZON.search(address.endpoint)
    config = Config(
        retries={"total_max_attempts": 1, "mode": "standard"},
        connect_timeout=CONNECT_S,
        read_timeout=ANSWER_S,
        signature_version="s3v4",
        s3={"addressing_style": "path" if elsewhere else "auto"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    region = address.region or "us-east-1"
    return session.create_client("s3", endpoint_url=address.endpoint, region_name=region, config=config)


def _frozen(session: Any, but: Collection[str] = ()) -> Any:
    given = session.get_credentials()
    return None if given is None or given.method in but else given.get_frozen_credentials()


def _status(error: Exception) -> int:
    return int((getattr(error, "response", None) or {}).get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)


def _code(error: Exception) -> str:
    return str((getattr(error, "response", None) or {}).get("Error", {}).get("Code") or "")


def _ahead_s(error: Exception) -> float:
    """How far this machine's clock is ahead of the server's, which dates its answers; 0 where it does not."""
    headers = (getattr(error, "response", None) or {}).get("ResponseMetadata", {}).get("HTTPHeaders", {})
    try:
        return time.time() - parsedate_to_datetime(headers["date"]).timestamp()
    except (KeyError, ValueError):
        return 0.0


def _bare(etag: str) -> str:
    """An ETag without the quotation marks, which some requests must not have."""
    return etag.strip('"')


def _passes(error: Exception) -> bool:
    """Whether the same request may succeed in a moment."""
    if isinstance(error, faults.ClientError):
        return _code(error) in PASSING or (_status(error) >= 500 and _status(error) != 501) or _status(error) == 429
    return isinstance(error, _CUT)
