"""Servers that do not do all that S3 does, played by a client in between."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from botocore.exceptions import ClientError


def refusal(status: int, code: str, message: str = "so it is", **headers: str) -> ClientError:
    answer = {"HTTPStatusCode": status, "HTTPHeaders": headers}
    error = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": answer}
    return ClientError(error, "PutObject")


class Unconditional:
    """A client of a server that forgets conditions silently, or that knows none (501)."""

    def __init__(self, client: Any, *, forgets: tuple[str, ...] = (), refuses: tuple[str, ...] = ()) -> None:
        self._client, self._forgets, self._refuses = client, forgets, refuses
        self.before: Callable[[str], None] = lambda key: None
        self.after: Callable[[], None] = lambda: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def put_object(self, **given: Any) -> Any:
        if set(given) & set(self._refuses):
            raise refusal(501, "NotImplemented")
        self.before(given["Key"])
        answer = self._client.put_object(**{name: each for name, each in given.items() if name not in self._forgets})
        self.after()
        return answer


class Unquoted(Unconditional):
    """Of a server that compares the tag as it is, without quotation marks, as Ceph 16 does."""

    def put_object(self, **given: Any) -> Any:
        if '"' in given.get("IfMatch", ""):
            raise refusal(412, "PreconditionFailed")
        return self._client.put_object(**given)


BOTH = ("IfNoneMatch", "IfMatch")


class Lagging:
    """A client of a server that shows what it is told only later: new contents, or the last object of a list."""

    def __init__(self, client: Any, *, lists: bool = False, reads: bool = False) -> None:
        self._client, self._lists, self._reads = client, lists, reads
        self._first: dict[str, bytes] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def list_objects_v2(self, **given: Any) -> Any:
        page = self._client.list_objects_v2(**given)
        return {**page, "Contents": page.get("Contents", [])[:-1]} if self._lists else page

    def put_object(self, **given: Any) -> Any:
        if self._reads:
            given["Body"] = self._first.setdefault(given["Key"], given["Body"].read())
            del given["ContentMD5"]
        return self._client.put_object(**given)


class Elsewhen(Unconditional):
    """A client of a server whose clock is so many seconds behind this machine's."""

    behind_s = 0.0

    def head_object(self, **given: Any) -> Any:
        head = self._client.head_object(**given)
        return {**head, "LastModified": head["LastModified"] - timedelta(seconds=self.behind_s)}
