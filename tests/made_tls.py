"""TLS before a server of this machine, with a certificate that a CA made here has signed."""

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any

import pytest


@contextlib.contextmanager
def before(server: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """host:port that speaks TLS and passes on to `server`; and the file of the CA that vouches for it."""
    if shutil.which("openssl") is None:
        pytest.skip("NO CERTIFICATE WAS TESTED: there is no openssl to make one")
    authority, certificate = _certificates(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    host, _, port = server.partition(":")

    class Pass(BaseRequestHandler):
        def handle(self) -> None:
            with (
                contextlib.suppress(OSError),
                context.wrap_socket(self.request, server_side=True) as outside,
                socket.create_connection((host, int(port))) as inside,
            ):
                back = threading.Thread(target=_pass_on, args=(inside, outside))
                back.start()
                _pass_on(outside, inside)
                back.join()

    with ThreadingTCPServer(("127.0.0.1", 0), Pass) as front:
        front.daemon_threads = True
        thread = threading.Thread(target=front.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{front.server_address[1]}", authority
        finally:
            front.shutdown()
            thread.join()


def _pass_on(source: Any, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


def _certificates(folder: Path) -> tuple[Path, Path]:
    """Files: the CA's certificate, and a server's with its key."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=made here")
    openssl("req", "-x509", *key, "-keyout", "server.key", "-out", "server.pem", "-subj", "/CN=127.0.0.1",
            "-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "subjectAltName=IP:127.0.0.1",
            "-addext", "basicConstraints=critical,CA:FALSE")  # fmt: skip
    both = folder / "both.pem"
    both.write_text((folder / "server.pem").read_text() + (folder / "server.key").read_text())
    return folder / "ca.pem", both
