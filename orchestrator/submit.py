"""A sweep as a Ray Job: its driver runs on the cluster's head, whatever becomes of the machine that submitted it.

The job brings the code of the submitter, not that of the wheel on the hosts, and the sweep file. Its id is made of both
the sweep's name and all that decides what is run, so that the same command again finds the job that is at work. When
that one has ended, the same command submits the next: it runs what is missing, as `mixmo run` does.
"""

import hashlib
import logging
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# Ray reads it when it is imported. Who has a token of a cluster means to use it.
if "RAY_AUTH_TOKEN" in os.environ or (Path.home() / ".ray/auth_token").is_file():
    os.environ.setdefault("RAY_AUTH_MODE", "token")

import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

import mixmo_core.config
from orchestrator.doctor import PYTHON, numbers
from orchestrator.errors import ExitCode, RefusedError, TokenError, UnreachableError, UsageError
from orchestrator.origin import Origin, origin
from orchestrator.store import folder_of
from orchestrator.sweep import Sweep

POLL_S = 2.0
_TALKATIVE = ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging")
"""Parts of Ray that tell of each package on stderr, which is for our own lines."""
_PYTHON = "${MIXMO_PYTHON:-python}"
"""In the words of the shell that starts a job. PATH is not to be relied on: where Ray was started over SSH, bash reads
~/.bashrc once more for each job, and what stands there may put another Python first.
"""
PACKAGES = (Path(mixmo_core.config.__file__).parent, Path(__file__).parent)
RAY = ".".join(ray.__version__.split(".")[:2])
"""Code here is written for this Ray: pyproject.toml allows no other."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """All that decides what a job runs."""

    sweep: Sweep
    results: str
    """As the cluster's hosts find it: s3://..., or an absolute folder."""
    data: str | None = None
    retry_failed: bool = False
    rehearse: bool = True
    """Whether the largest trial takes two steps first (`canary`)."""

    @property
    def file(self) -> str:
        """The sweep file's name in the package."""
        return f"{self.sweep.name.removesuffix('-quick')}.yaml"

    @property
    def entrypoint(self) -> str:
        words = ["-m", "orchestrator.cli", "run", self.file, "--yes", "--results", self.results]
        words += ["--quick"] if self.sweep.quick else []
        words += [word for override in self.sweep.overrides for word in ("-S", override)]
        words += ["--data", self.data] if self.data else []
        words += ["--retry-failed"] if self.retry_failed else []
        words += [] if self.rehearse else ["--no-canary"]
        return f"{_PYTHON} {shlex.join(words)}"

    @property
    def digest(self) -> str:
        """Of the file and the command; 10 hex digits. Which commit runs it does not count: results are the same."""
        return hashlib.sha256(f"{self.entrypoint}\n{self.sweep.text}".encode()).hexdigest()[:10]


@dataclass(frozen=True, slots=True)
class Job:
    """A job of ours on a cluster."""

    id: str
    sweep: str
    results: str
    digest: str
    code: str
    ended: bool

    @classmethod
    def of(cls, details: Any) -> "Job | None":
        words = details.metadata or {}
        if "mixmo_sweep" not in words or details.submission_id is None:
            return None
        return cls(
            details.submission_id, words["mixmo_sweep"], words.get("mixmo_results", ""), words.get("mixmo_digest", ""),
            words.get("mixmo_code", ""), details.status.is_terminal(),
        )  # fmt: skip


class Cluster:
    """The jobs of a Ray cluster, through its dashboard."""

    def __init__(self, address: str) -> None:
        """Raises UsageError for what is no address, UnreachableError, or RefusedError where the cluster's Ray is not
        ours or it does not take our token.
        """
        if urlsplit(address).scheme not in ("http", "https"):
            raise UsageError(
                f"--address {address}: give the dashboard's, as http://127.0.0.1:8265. `ray dashboard "
                "cluster/gpu.yaml` brings it there, and so does ssh -L 8265:127.0.0.1:8265 HEAD"
            )
        self.address = address
        for part in _TALKATIVE:
            logging.getLogger(f"ray.{part}").setLevel(logging.ERROR)
        with self._in_our_words():
            self._client = JobSubmissionClient(address)
            # Which Python it runs is told by nothing public. A dashboard that has just started may not know it yet.
            told = self._client._do_request("GET", "/api/v0/cluster_metadata").json().get("data") or {}
        self.ray, self.python = str(told.get("rayVersion", ray.__version__)), told.get("pythonVersion")
        self._check_versions()

    def submit(self, request: Request, say: Callable[[str], None]) -> Job:
        """The job that runs this: one that is at work already, or a new one.

        Raises RefusedError where another one runs a sweep of this name, or the hosts do not share the results.
        """
        with self._in_our_words():
            jobs = self.jobs()
        came_from, (sweep, results) = origin(), _sweep_of(request)
        for job in jobs:
            if not job.ended and (job.sweep, job.results) == (sweep, results):
                return self._found(job, request, came_from, say)
        if is_folder(results):
            self._prove_shared(results, say)
        before = sum((job.sweep, job.digest) == (sweep, request.digest) for job in jobs)
        return self._send(request, f"mixmo-{sweep}-{request.digest}-{before + 1}", came_from, say)

    def _found(self, job: Job, request: Request, came_from: Origin, say: Callable[[str], None]) -> Job:
        if job.digest != request.digest:
            raise RefusedError(
                f"{job.sweep}: another file of this name is being run, as job {job.id}. Stop that first (mixmo stop "
                f"{job.sweep} --results {shlex.quote(job.results)}), or give the sweep another name"
            )
        if job.code != str(came_from):
            say(f"it runs with the code {job.code}, not with this one, {came_from}")
        say(f"{job.sweep} is at work already, as job {job.id}")
        return job

    def _prove_shared(self, results: str, say: Callable[[str], None]) -> None:
        """Have a short job find out whether all hosts see this folder. Raises RefusedError with what it says."""
        say(f"asking every host whether it sees {results}")
        command = f"{_PYTHON} {shlex.join(['-m', 'orchestrator.cli', 'reach', results])}"
        with packaged(None) as folder, self._in_our_words():
            job = self._client.submit_job(entrypoint=command, runtime_env={"working_dir": str(folder)})
        code = self.follow(job, None, None)
        if code != ExitCode.OK:
            with self._in_our_words():
                told = self._client.get_job_logs(job).strip().splitlines()
            text = "\n".join(line.removeprefix("mixmo: ") for line in told if line.startswith("mixmo: ")) or "\n".join(
                told[-5:]
            )
            if code == ExitCode.REFUSED:
                raise RefusedError(text)
            raise UnreachableError(f"the cluster could not tell whether its hosts share {results}:\n{text}")

    def jobs(self) -> list[Job]:
        """Those of ours, the ended ones too."""
        return [job for details in self._client.list_jobs() if (job := Job.of(details)) is not None]

    def follow(self, job: str, show: Callable[[str], None] | None, timeout_s: float | None) -> ExitCode:
        """Wait for a job's end, and show what it prints meanwhile. How it ended; STOPPED when the time is over first.
        A cluster that is out of reach for a minute is waited for: the tunnel was cut, or the laptop slept.
        """
        deadline, shown, silent = time.monotonic() + (timeout_s or float("inf")), 0, 0.0
        while True:
            try:
                with self._in_our_words():
                    details = self._client.get_job_info(job)
                    text = self._client.get_job_logs(job) if show is not None else ""
                silent = 0.0
            except UnreachableError:
                silent += POLL_S
                if silent > 60:
                    raise
                time.sleep(POLL_S)
                continue
            lines = text[shown:].splitlines(keepends=True)
            if lines and not lines[-1].endswith("\n") and not details.status.is_terminal():
                lines.pop()
            for line in lines:
                assert show is not None
                show(line.rstrip("\n"))
            shown += sum(map(len, lines))
            if details.status.is_terminal():
                return _ending(details)
            if time.monotonic() > deadline:
                return ExitCode.STOPPED
            time.sleep(POLL_S)

    def _send(self, request: Request, job: str, came_from: Origin, say: Callable[[str], None]) -> Job:
        sweep, results = _sweep_of(request)
        words = {
            "mixmo_sweep": sweep,
            "mixmo_results": results,
            "mixmo_digest": request.digest,
            "mixmo_code": str(came_from),
        }
        try:
            with packaged(request) as folder, self._in_our_words():
                self._client.submit_job(
                    entrypoint=request.entrypoint, submission_id=job, metadata=words,
                    runtime_env={"working_dir": str(folder)},
                )  # fmt: skip
            say(f"{sweep}: submitted as job {job}, with the code {came_from}")
        except UnreachableError as error:
            if "already exists" not in str(error):
                raise
            say(f"{sweep} is at work already, as job {job}: somebody has just submitted it, too")
        return Job(job, sweep, results, request.digest, str(came_from), ended=False)

    def _check_versions(self) -> None:
        """Nothing is pickled between this machine and the cluster, but the code has to run there."""
        for name, theirs, fits, ours in (
            ("Ray", self.ray, self.ray.split(".")[:2] == RAY.split("."), RAY),
            ("Python", self.python, numbers(self.python or "99") >= PYTHON, f"{'.'.join(map(str, PYTHON))} or newer"),
        ):
            if not fits:
                raise RefusedError(
                    f"the cluster at {self.address} has {name} {theirs}, and this code needs {ours}. What is in "
                    "constraints.txt is what `make wheel && ray up cluster/gpu.yaml` installs there"
                )

    @contextmanager
    def _in_our_words(self) -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            raise TokenError(f"the cluster at {self.address}") from error
        except (ConnectionError, requests.exceptions.RequestException) as error:
            raise UnreachableError(
                f"no Ray answers at {self.address}. `ray dashboard cluster/gpu.yaml` brings it to "
                "http://127.0.0.1:8265, and so does ssh -L 8265:127.0.0.1:8265 HEAD; leave it running, and give the "
                "command again"
            ) from error
        except RuntimeError as error:
            raise UnreachableError(f"the cluster at {self.address} did not take it: {error}") from error


def _sweep_of(request: Request) -> tuple[str, str]:
    return request.sweep.name, request.results


def _ending(details: Any) -> ExitCode:
    """As the driver ended, where it did."""
    if details.status == JobStatus.STOPPED:
        return ExitCode.STOPPED
    code = details.driver_exit_code
    if code is None:
        if details.status == JobStatus.SUCCEEDED:
            return ExitCode.OK
        raise UnreachableError(f"the job could not be run: {details.message}. Give the same command again")
    if code < 0:
        raise UnreachableError(f"its driver was killed by signal {-code}. The same command continues the sweep")
    known = [each.value for each in ExitCode]
    return ExitCode(code) if code in known else ExitCode.BUG


@contextmanager
def packaged(request: Request | None) -> Iterator[Path]:
    """A folder with the code that runs here, where it comes from, and the sweep file. It goes with the block."""
    with tempfile.TemporaryDirectory(prefix="mixmo-package-") as name:
        folder = Path(name)
        for package in PACKAGES:
            shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        origin().write(folder / "orchestrator")
        if request is not None:
            (folder / request.file).write_text(request.sweep.text)
        yield folder


def place(results: str) -> str:
    """Results as the cluster's hosts find them: a folder by its whole path."""
    folder = folder_of(results)
    return results if folder is None else str(folder)


def is_folder(results: str) -> bool:
    return folder_of(results) is not None
