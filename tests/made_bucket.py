"""A server that speaks S3, on this machine alone: moto's, in a process of its own.

On S3 a conditional write is one step. moto looks, and then writes, and between the two another thread of its may write:
here one at a time does both.
"""

import contextlib
import importlib.util
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

STARTS_S = 60.0
KEY, SECRET = "testkey", "hush-hush-testsecret"
_numbers = itertools.count(1)


@contextlib.contextmanager
def serve() -> Iterator[str]:
    """host:port of a server on the loopback. Skips the test where it is not installed."""
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask") is None:
        pytest.skip("NO BUCKET WAS TESTED: moto's server is not installed (pip install 'moto[server]')")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, __file__, "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    try:
        _wait(process, port)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _wait(process: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + STARTS_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the S3 server ended with {process.returncode}"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError(f"the S3 server did not start in {STARTS_S:.0f} s")


def client(endpoint: str) -> Any:
    import boto3

    return boto3.client(
        "s3", endpoint_url=f"http://{endpoint}", region_name="us-east-1", aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
    )  # fmt: skip


def make_bucket(endpoint: str) -> str:
    """The name of a new one."""
    name = f"made-{next(_numbers)}"
    made = client(endpoint)
    made.create_bucket(Bucket=name)
    made.close()
    return name


def _one_at_a_time(write: Callable[..., Any], lock: threading.Lock) -> Callable[..., Any]:
    def alone(*given: Any, **named: Any) -> Any:
        with lock:
            return write(*given, **named)

    return alone


def _main() -> None:
    from moto.s3.responses import S3Response
    from moto.server import main

    lock = threading.Lock()
    for name in ("put_object", "delete_object"):
        setattr(S3Response, name, _one_at_a_time(getattr(S3Response, name), lock))
    main(sys.argv[1:])


if __name__ == "__main__":
    _main()
