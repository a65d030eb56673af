"""Word from a cloud that it will take this machine away, minutes before it does.

Amazon tells a spot machine by its metadata (version 2: a token first), which has to be asked again and again. Nobody in
Ray asks: an autoscaler sees a machine only when it is gone.
"""

import contextlib
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from orchestrator.errors import UsageError

PERIOD_S = 5.0
"""As often as Amazon advises to ask. The notice comes two minutes before the end."""
ANSWER_S = 2.0
TOKEN_S = 3600
SETTING = "MIXMO_SPOT_NOTICE"
VENDOR = Path("/sys/devices/virtual/dmi/id/sys_vendor")
_AMAZON = "http://169.254.169.254"


def endpoint(environ: Mapping[str, str] = os.environ, vendor: Path = VENDOR) -> str | None:
    """Where to ask, on this machine; None where there is nobody to ask.

    MIXMO_SPOT_NOTICE is `auto` (on Amazon's machines alone, which say in a file what they are), `off`, or an address.
    The variables of AWS for its metadata hold, too. Raises UsageError for anything else.
    """
    asked = environ.get(SETTING, "auto")
    if asked.startswith(("http://", "https://")):
        return asked.rstrip("/")
    if asked not in ("auto", "off"):
        raise UsageError(f"{SETTING}={asked}: must be auto, off, or an address such as {_AMAZON}")
    if asked == "off" or environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return None
    with contextlib.suppress(OSError):
        if vendor.read_text().strip() == "Amazon EC2":
            return (environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or _AMAZON).rstrip("/")
    return None


class Notice(NamedTuple):
    """What the cloud will do with this machine, and how many seconds from now."""

    action: str
    left_s: float

    def __str__(self) -> str:
        return f"spot notice: {self.action} in {self.left_s:.0f} s"


class Watch:
    """Asks in a thread of its own, and tells once."""

    def __init__(self, address: str, tell: Callable[[Notice], None], period_s: float = PERIOD_S) -> None:
        """`tell` is called from the thread, before `given` is true."""
        self.given = False
        self._address, self._tell, self._period_s = address, tell, period_s
        self._token: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="spot notice", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(2 * ANSWER_S)

    def _watch(self) -> None:
        while not self._stop.is_set():
            notice = None
            with contextlib.suppress(OSError, ValueError):  # no answer is no notice; the next time may be better
                notice = self.ask()
            if notice is not None:
                self._tell(notice)
                self.given = True
                return
            self._stop.wait(self._period_s)

    def ask(self) -> Notice | None:
        """The notice, if there is one. Raises OSError where nobody answers, ValueError for an answer that is none."""
        try:
            if self._token is None:
                headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_S)}
                self._token = self._request("PUT", "/latest/api/token", headers)
            headers = {"X-aws-ec2-metadata-token": self._token}
            said = json.loads(self._request("GET", "/latest/meta-data/spot/instance-action", headers))
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 404:
                    return None
                self._token = None  # it is over after an hour
                raise
        if not isinstance(said, dict) or said.get("action") not in ("terminate", "stop", "hibernate"):
            raise ValueError(f"no spot notice: {said}")
        until = datetime.fromisoformat(str(said.get("time")).replace("Z", "+00:00"))
        return Notice(said["action"], max(0.0, (until - datetime.now(UTC)).total_seconds()))

    def _request(self, method: str, path: str, headers: Mapping[str, str]) -> str:
        request = urllib.request.Request(self._address + path, method=method, headers=dict(headers))
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the metadata are this machine's own
        with direct.open(request, timeout=ANSWER_S) as answer:
            return str(answer.read().decode())
