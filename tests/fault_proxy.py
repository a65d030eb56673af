"""A path that fails: an HTTP proxy on the loopback between a store and its S3 server, which injects faults by a seed.

    with serve() as server, FaultProxy(server, seed="7", rate=0.05) as proxy:
        ResultStore.open(f"s3://bucket/results?endpoint_override={proxy.endpoint}&scheme=http")

Requests go on as they came, Host and signature included, so the server still verifies them. What becomes of a request
hangs on the seed, its method, its path and how often it was made before, not on which thread was faster.
As a program of its own: `python tests/fault_proxy.py 127.0.0.1:9000 --rate 0.05 --seed 7`.
"""

import argparse
import contextlib
import http.client
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Self
from urllib.parse import parse_qsl, unquote, unquote_plus, urlsplit

Kind = Literal[
    "slow_down", "error", "cut_before", "cut_after", "cut_request", "cut_response", "stall",
]  # fmt: skip
KINDS: tuple[Kind, ...] = ("slow_down", "error", "cut_before", "cut_after", "cut_request", "cut_response", "stall")
"""503; 500; a reset before the server acted, or after; half of what is sent, or answered; a late answer."""
When = Literal["before", "after"]
_ANSWERS = {"slow_down": (503, "SlowDown"), "error": (500, "InternalError")}
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length"}
_CONDITIONS = {"if-match", "if-none-match"}
Headers = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    """With its query, as it came."""
    headers: Headers
    body: bytes

    @property
    def key(self) -> str:
        """`bucket/key`, as people write it."""
        return unquote(urlsplit(self.path).path).lstrip("/")

    @property
    def lists(self) -> bool:
        query = dict(parse_qsl(urlsplit(self.path).query, keep_blank_values=True))
        return self.method == "GET" and "list-type" in query

    def header(self, name: str) -> str | None:
        return next((value for each, value in self.headers if each.lower() == name), None)


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    headers: Headers
    body: bytes


@dataclass(slots=True, eq=False)
class Trap:
    """What is to happen when a certain request comes by, once."""

    method: str
    pattern: re.Pattern[str]
    when: When
    action: Callable[[], None]
    skip: int = 0
    """So many such requests go through before."""
    sprung: threading.Event = field(default_factory=threading.Event)


class FaultProxy:
    """In front of the S3 server at `upstream` (host:port). Its settings may be changed while it runs."""

    def __init__(
        self,
        upstream: str,
        *,
        seed: str = "0",
        rate: float = 0.0,
        kinds: tuple[Kind, ...] = KINDS,
        stale_rate: float = 0.0,
        stale_s: float = 5.0,
        stall_s: float = 1.0,
        drop_conditions: tuple[str, str] | None = None,
    ) -> None:
        """`rate` of the requests fail in one of these ways, `stale_rate` of the listings hide what was written in the
        last `stale_s`. `drop_conditions` makes a server that knows neither If-Match nor If-None-Match: they are signed,
        so it takes the key and the secret to sign what is left.
        """
        self.upstream, self.seed, self.rate, self.kinds = upstream, seed, rate, kinds
        self.stale_rate, self.stale_s, self.stall_s = stale_rate, stale_s, stall_s
        self.drop_conditions = drop_conditions
        self.fired: Counter[str] = Counter()
        """How often each fault has happened. A listing counts as stale only where it hid something."""
        self.history: list[tuple[str, str, str]] = []
        """The same in the order in which it happened: fault, method, `bucket/key`."""
        self.requests = 0
        self._seen: Counter[tuple[str, str]] = Counter()
        self._written: dict[str, float] = {}
        self._traps: list[Trap] = []
        self._lock = threading.Lock()
        self._clients: set[socket.socket] = set()
        self._silent = threading.Event()
        self._closed = False
        self._listener = self._listen(0)
        self.port: int = self._listener.getsockname()[1]

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._hang_up()

    def trap(self, method: str, pattern: str, when: When, action: Callable[[], None], skip: int = 0) -> Trap:
        """Do this when such a request comes: before the server sees it, or when it has acted and not yet answered.

        The client gets no answer. `pattern` is searched for in `bucket/key`; `sprung` tells when it has happened.
        """
        trap = Trap(method, re.compile(pattern), when, action, skip)
        with self._lock:
            self._traps.append(trap)
        return trap

    def forget(self, trap: Trap) -> None:
        """It is not to happen any more."""
        with self._lock:
            if trap in self._traps:
                self._traps.remove(trap)

    @contextlib.contextmanager
    def away(self, how: Literal["refused", "silent"] = "refused") -> Iterator[None]:
        """While this lasts nobody reaches the server: connections are refused, or taken and never answered."""
        if how == "silent":
            self._silent.set()
        else:
            self._hang_up()
        self.fired["away"] += 1
        try:
            yield
        finally:
            if how == "silent":
                self._silent.clear()
                self._cut_clients()
            else:
                self._listener = self._listen(self.port)

    # ---- connections

    def _listen(self, port: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(128)
        threading.Thread(target=self._accept, args=(listener,), name="fault-proxy", daemon=True).start()
        return listener

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._cut_clients()

    def _cut_clients(self) -> None:
        with self._lock:
            clients = list(self._clients)
        for client in clients:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:  # hung up
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._clients.add(client)
            threading.Thread(target=self._serve, args=(client,), name="fault-proxy", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """One connection, request after request."""
        host, _, port = self.upstream.rpartition(":")
        server = http.client.HTTPConnection(host, int(port), timeout=120)
        try:
            with client.makefile("rb") as incoming:
                while (request := _read_request(incoming, client)) is not None:
                    while self._silent.is_set():
                        time.sleep(0.05)
                    if not self._answer(request, client, server):
                        return
        except (OSError, http.client.HTTPException, ValueError):
            pass  # either side is gone: so is the connection
        finally:
            server.close()
            with self._lock:
                self._clients.discard(client)
            _reset(client)

    # ---- one request

    def _answer(self, request: Request, client: socket.socket, server: http.client.HTTPConnection) -> bool:
        """Whether the connection goes on."""
        fault = self._draw(request)
        if self._spring(request, "before") or fault == "cut_before":
            return False
        if fault in _ANSWERS:
            _send(client, request, _refusal(*_ANSWERS[fault]))
            return True
        if fault == "cut_request":
            _send_half(request, self.upstream)
            return False
        response = self._forward(request, server)
        if self._spring(request, "after") or fault == "cut_after":
            return False
        if fault == "stall":
            time.sleep(self.stall_s)
        _send(client, request, self._noted(request, response), half=fault == "cut_response")
        return fault != "cut_response"

    def _draw(self, request: Request) -> Kind | None:
        with self._lock:
            self.requests += 1
            self._seen[request.method, request.path] += 1
            draw = self._dice(request)
            kinds = [kind for kind in self.kinds if _suits(kind, request)]
            if not kinds or draw.random() >= self.rate:
                return None
            kind = draw.choice(kinds)
            self.fired[kind] += 1
            self.history.append((kind, request.method, request.key))
            return kind

    def _dice(self, request: Request, purpose: str = "") -> random.Random:
        count = self._seen[request.method, request.path]
        return random.Random(f"{self.seed} {request.method} {request.path} {count} {purpose}")

    def _spring(self, request: Request, when: When) -> bool:
        with self._lock:
            for trap in self._traps:
                if trap.when == when and trap.method == request.method and trap.pattern.search(request.key):
                    if trap.skip:
                        trap.skip -= 1
                        continue
                    self._traps.remove(trap)
                    break
            else:
                return False
        self.fired[f"trap {when}"] += 1
        trap.action()
        trap.sprung.set()
        return True

    def _forward(self, request: Request, server: http.client.HTTPConnection) -> Response:
        headers = [(name, value) for name, value in request.headers if name.lower() not in _HOP_BY_HOP]
        if self.drop_conditions and any(name.lower() in _CONDITIONS for name, _ in headers):
            self.fired["drop_conditions"] += 1
            headers = _signed_anew(request, headers, *self.drop_conditions)
        try:
            return _exchange(server, request, headers)
        except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
            server.close()  # it was kept open for longer than the server likes
            return _exchange(server, request, headers)

    def _noted(self, request: Request, response: Response) -> Response:
        """The answer; of a listing, perhaps without what is new."""
        with self._lock:
            now = time.monotonic()
            if request.method == "PUT" and response.status == 200:
                self._written[request.key] = now
            if not request.lists or self._dice(request, "stale").random() >= self.stale_rate:
                return response
            new = {key for key, since in self._written.items() if now - since < self.stale_s}
            body, hidden = _without(response.body, request.key.strip("/"), new)
            self.fired["stale_list"] += hidden > 0
        return Response(response.status, response.headers, body)


def _suits(kind: Kind, request: Request) -> bool:
    if kind == "cut_request":
        return len(request.body) > 1
    return kind != "cut_response" or request.method == "GET"


def _read_request(incoming: Any, client: socket.socket) -> Request | None:
    """The next one on this connection; None where it has ended."""
    first = incoming.readline(65536).decode("latin-1").split()
    if len(first) != 3:
        return None
    headers: Headers = []
    while (line := incoming.readline(65536).decode("latin-1").rstrip("\r\n")) != "":
        name, _, value = line.partition(":")
        headers.append((name, value.strip()))
    request = Request(first[0], first[1], headers, b"")
    if (request.header("expect") or "").lower() == "100-continue":
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    if (request.header("transfer-encoding") or "").lower() == "chunked":
        body = _read_chunks(incoming)
    else:
        body = incoming.read(int(request.header("content-length") or 0))
    return Request(first[0], first[1], headers, body)


def _read_chunks(incoming: Any) -> bytes:
    body = b""
    while size := int(incoming.readline(1024).split(b";")[0], 16):
        body += incoming.read(size)
        incoming.readline(8)
    while incoming.readline(65536).strip():
        pass
    return body


def _exchange(server: http.client.HTTPConnection, request: Request, headers: Headers) -> Response:
    server.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
    for name, value in headers:
        server.putheader(name, value)
    if request.body or request.header("content-length") is not None:
        server.putheader("Content-Length", str(len(request.body)))
    server.endheaders(request.body or None)
    answer = server.getresponse()
    body = answer.read()
    kept = _HOP_BY_HOP if request.method != "HEAD" else _HOP_BY_HOP - {"content-length"}
    return Response(answer.status, [each for each in answer.getheaders() if each[0].lower() not in kept], body)


def _send(client: socket.socket, request: Request, response: Response, half: bool = False) -> None:
    lines = [f"HTTP/1.1 {response.status} {http.client.responses.get(response.status, 'Unknown')}"]
    lines += [f"{name}: {value}" for name, value in response.headers]
    if request.method != "HEAD" and response.status != 204:
        lines.append(f"Content-Length: {len(response.body)}")
    body = response.body if request.method != "HEAD" else b""
    client.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + (body[: len(body) // 2] if half else body))


def _send_half(request: Request, upstream: str) -> None:
    """Give the server the first half of the body, and hang up on it."""
    host, _, port = upstream.rpartition(":")
    headers = [(name, value) for name, value in request.headers if name.lower() not in _HOP_BY_HOP]
    lines = [f"{request.method} {request.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
    lines.append(f"Content-Length: {len(request.body)}")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=10) as server:
        server.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + request.body[: len(request.body) // 2])
        server.shutdown(socket.SHUT_WR)
        server.recv(65536)  # it has read what there is


def _refusal(status: int, code: str) -> Response:
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>by the fault proxy</Message></Error>'
    return Response(status, [("Content-Type", "application/xml")], body.encode())


def _reset(client: socket.socket) -> None:
    """Hang up without a good-bye."""
    with contextlib.suppress(OSError):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def _signed_anew(request: Request, headers: Headers, key: str, secret: str) -> Headers:
    """The headers without conditions, and with the signature that fits them."""
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    signature = request.header("authorization") or ""
    scope = re.search(r"Credential=[^/]+/\d+/([^/]+)/s3/", signature)
    dropped = {*_CONDITIONS, "authorization", "x-amz-date"}
    left = {name: value for name, value in headers if name.lower() not in dropped}
    made = AWSRequest(request.method, f"http://{request.header('host')}{request.path}", left, request.body)
    S3SigV4Auth(Credentials(key, secret), "s3", scope[1] if scope else "us-east-1").add_auth(made)
    return [(name, str(value)) for name, value in made.headers.items()]


def _without(body: bytes, bucket: str, keys: set[str]) -> tuple[bytes, int]:
    """A listing without these objects (`bucket/key`), and how many it has lost."""
    hidden = 0

    def keep(match: re.Match[bytes]) -> bytes:
        nonlocal hidden
        key = unquote_plus(match[1].decode()).replace("&amp;", "&")
        if f"{bucket}/{key}" not in keys:
            return match[0]
        hidden += 1
        return b""

    body = re.sub(rb"<Contents>(?:(?!</Contents>).)*?<Key>([^<]*)</Key>.*?</Contents>", keep, body, flags=re.DOTALL)

    def fewer(match: re.Match[bytes]) -> bytes:
        return b"<KeyCount>%d</KeyCount>" % (int(match[1]) - hidden)

    return re.sub(rb"<KeyCount>(\d+)</KeyCount>", fewer, body), hidden


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    words.add_argument("upstream", help="host:port of the S3 server")
    words.add_argument("--seed", default="0")
    words.add_argument("--rate", type=float, default=0.0)
    words.add_argument("--stale-rate", type=float, default=0.0)
    given = words.parse_args()
    with FaultProxy(given.upstream, seed=given.seed, rate=given.rate, stale_rate=given.stale_rate) as proxy:
        print(proxy.endpoint, flush=True)  # noqa: T201
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


if __name__ == "__main__":
    main()
