"""The metadata of a machine at a cloud, on the loopback: a token first, then no notice, then one."""

import contextlib
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "a-token-of-a-test"


class Metadata(ThreadingHTTPServer):
    """`notice` is what it says from then on; `expire` makes the tokens given so far worthless."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.body: str | None = None
        self.tokens = self.asked = 0
        self.valid = TOKEN

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def notice(self, seconds: float = 120, action: str = "terminate") -> None:
        until = datetime.now(UTC) + timedelta(seconds=seconds)
        self.body = f'{{"action": "{action}", "time": "{until:%Y-%m-%dT%H:%M:%SZ}"}}'

    def expire(self) -> None:
        self.valid = f"{TOKEN}-{self.tokens}"


class _Answer(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        asked = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
        if self.path != "/latest/api/token" or not asked.isdigit():
            return self._say(400, "")
        self.server.tokens += 1
        return self._say(200, self.server.valid)

    def do_GET(self) -> None:
        if self.headers.get("X-aws-ec2-metadata-token") != self.server.valid:
            return self._say(401, "")
        self.server.asked += 1
        if self.path != "/latest/meta-data/spot/instance-action" or self.server.body is None:
            return self._say(404, "")
        return self._say(200, self.server.body)

    def _say(self, code: int, text: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextlib.contextmanager
def serve() -> Iterator[Metadata]:
    with Metadata() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
