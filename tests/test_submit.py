"""`mixmo submit`: whole sweeps as jobs of a real Ray of several hosts, and what is refused."""

import dataclasses
import http.server
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made_cluster
import pytest
from command_line import Mixmo
from made_cluster import MadeCluster
from test_driver import SWEEP

from orchestrator import reach
from orchestrator.errors import RefusedError, TokenError
from orchestrator.origin import FILE, Origin, origin
from orchestrator.plan import initial_row
from orchestrator.store import ResultStore
from orchestrator.submit import Request
from orchestrator.sweep import parse

SMALL = (
    SWEEP.replace("seeds: 2", "seeds: 1")
    .replace("epochs: 6", "epochs: 3")
    .replace("worker: 0}", "worker: 0, max_gangs: 1}")
)
ANSWERS = {
    "/api/version": {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""},
    "/api/v0/cluster_metadata": {"result": True, "data": {"rayVersion": "2.60.0", "pythonVersion": "3.12.3"}},
}


class Submitter(Mixmo):
    """The command line of somebody who has the token of a cluster."""

    def __init__(self, folder: Path, sweep: str, environment: dict[str, str]) -> None:
        super().__init__(folder, sweep)
        self.more = environment

    def _environment(self) -> dict[str, str]:
        return {**super()._environment(), "HOME": str(self.folder), **self.more}


# --------------------------------------------------------------------------------------------- on a real Ray of three


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of which one host of the cluster sees another one."""
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel on the hosts whose code nobody can import: the submitted code has to win over it, everywhere."""
    folder = tmp_path_factory.mktemp("installed")
    for package in ("orchestrator", "mixmo_core"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text("raise ImportError('this is the installed wheel')\n")
    return folder


@pytest.fixture(scope="module")
def cluster(elsewhere: Path, installed: Path) -> Iterator[MadeCluster]:
    alone = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {elsewhere} && exec "$@"', "sh"]
    can = (
        os.geteuid() == 0 and shutil.which("unshare") and subprocess.run([*alone, "true"], check=False).returncode == 0
    )
    with made_cluster.started([[], alone if can else []], {"PYTHONPATH": str(installed)}) as made:
        yield made


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sweep_runs_as_a_job_with_the_submitted_code_and_a_repeat_finds_it(
    cluster: MadeCluster, tmp_path: Path, elsewhere: Path
) -> None:
    mixmo = Submitter(tmp_path / "laptop", SMALL, cluster.environment())
    submit = ["submit", "sweep.yaml", "--address", cluster.address]

    first = mixmo(*submit)
    assert "submitted as job" in first.stderr
    job = first.stdout.strip()
    assert job.startswith("mixmo-small-")
    again = mixmo(*submit)
    assert (again.stdout.strip(), "at work already" in again.stderr) == (job, True)

    other = Submitter(tmp_path / "laptop", SMALL, cluster.environment())
    (tmp_path / "laptop/sweep.yaml").write_text(SMALL.replace("lr: 0.1", "lr: 0.2"))
    assert "mixmo stop small" in other(*submit, code=6).stderr
    (tmp_path / "laptop/sweep.yaml").write_text(SMALL)

    following = mixmo.start(*submit, "--wait")
    out, err = following.communicate(timeout=1200)  # a gang is many processes, and others may use the machine
    assert (following.returncode, out.strip()) == (0, job), err
    rows = mixmo.rows()
    assert {row.state for row in rows} == {"TERMINATED"}
    assert {(row.git_commit, row.git_dirty) for row in rows} == {(origin().git_commit, origin().git_dirty)}
    log = ResultStore.open(tmp_path / "laptop/results").log(rows[0].trial_id, 0)
    assert f"code {origin()}" in log
    assert "nothing to run" in mixmo(*submit).stderr

    # A folder that one of the hosts does not share.
    refused = mixmo(*submit, "--results", str(elsewhere / "results"), code=6)
    assert "not in reach of 1 of the cluster's 3 hosts" in refused.stderr
    assert "--results s3://BUCKET/results" in refused.stderr
    assert not (elsewhere / "results/sweeps").exists()

    wrong = Submitter(tmp_path / "laptop", SMALL, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 32})
    (tmp_path / "laptop/sweep.yaml").write_text(SMALL.replace("seeds: 1", "seeds: 2"))
    assert "~/.ray/auth_token" in wrong(*submit, code=6).stderr


# ------------------------------------------------------------------------------------------------ before any job runs


@pytest.fixture
def dashboard() -> Iterator[tuple[str, dict[str, Any]]]:
    """Something that answers as Ray's dashboard does; what it answers can be changed."""
    answers = json.loads(json.dumps(ANSWERS))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = json.dumps(answers.get(self.path, {})).encode()
            self.send_response(200 if self.path in answers else answers.get("else", 404))
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *words: Any) -> None:
            """In silence."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", answers
        server.shutdown()


@pytest.fixture
def mixmo(tmp_path: Path) -> Submitter:
    return Submitter(tmp_path / "laptop", SMALL, {"RAY_AUTH_MODE": "disabled"})


def test_a_cluster_with_another_ray_is_refused_before_anything_is_sent(
    mixmo: Submitter, dashboard: tuple[str, dict[str, Any]]
) -> None:
    address, answers = dashboard
    answers["/api/version"]["ray_version"] = answers["/api/v0/cluster_metadata"]["data"]["rayVersion"] = "2.61.1"
    told = mixmo("submit", "sweep.yaml", "--address", address, code=6).stderr
    assert "has Ray 2.61.1, and this code needs 2.60" in told
    assert "ray up" in told


def test_a_cluster_whose_python_is_too_old_is_refused(
    mixmo: Submitter, dashboard: tuple[str, dict[str, Any]]
) -> None:  # fmt: skip
    address, answers = dashboard
    answers["/api/v0/cluster_metadata"]["data"]["pythonVersion"] = "3.10.12"
    told = mixmo("submit", "sweep.yaml", "--address", address, code=6).stderr
    assert "has Python 3.10.12, and this code needs 3.11 or newer" in told


def test_where_no_ray_answers_it_says_how_to_bring_it_here(mixmo: Submitter) -> None:
    told = mixmo("submit", "sweep.yaml", "--address", "http://127.0.0.1:1", code=7).stderr
    assert "ray dashboard cluster/gpu.yaml" in told


def test_a_token_that_is_wanted_and_missing_is_6(mixmo: Submitter, tmp_path: Path) -> None:
    mixmo.more = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "",
        "HOME": str(tmp_path),
    }  # whoever runs this may have one
    told = mixmo("submit", "sweep.yaml", "--address", "http://127.0.0.1:1", code=6).stderr
    assert "RAY_AUTH_MODE is token, and there is no token here" in told
    assert "~/.ray/auth_token" in told


@pytest.mark.parametrize(
    ("mode", "kept", "said"),
    [
        ("", "", "the cluster asks for a token, and does not take a request without one: set RAY_AUTH_MODE=token"),
        ("token", "wrong", "the cluster asks for a token, and does not take the one that is here"),
        ("token", " \n", "RAY_AUTH_MODE is token, and there is no token here"),
        ("token", None, "RAY_AUTH_MODE is token, and there is no token here"),
    ],
)
def test_a_token_error_says_whose_fault_it_is_and_never_the_token(
    mode: str, kept: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    if kept is not None:
        (tmp_path / "token").write_text(kept)
    told = str(TokenError("the cluster"))
    assert told.startswith(said)
    assert "wrong" not in told


NOBODY = ("--address", "http://127.0.0.1:1")
DRAWN = """
search: {method: optuna, num_samples: 3, ranges: {optim.lr: {min: 0.01, max: 0.1, scale: log}}}
"""


def test_a_search_that_has_drawn_nothing_yet_is_submitted(tmp_path: Path) -> None:
    mixmo = Submitter(tmp_path / "laptop", SMALL + DRAWN, {"RAY_AUTH_MODE": "disabled"})
    told = mixmo("submit", "sweep.yaml", *NOBODY, code=7).stderr
    assert "no Ray answers" in told
    assert "nothing to run" not in told


def test_a_budget_that_run_would_refuse_is_refused_before_the_cluster_is_asked(mixmo: Submitter) -> None:
    refused = mixmo("submit", "sweep.yaml", *NOBODY, "-S", "seeds=3", "-S", "budget.trials=2", code=6).stderr
    assert "budget.trials allows 2" in refused


def test_what_has_ended_with_failures_ends_as_run_does(mixmo: Submitter) -> None:
    sweep = parse(SMALL, source="sweep.yaml")
    with ResultStore.open(mixmo.folder / "results", create=True).writer(sweep.name, sweep_text=sweep.text) as writer:
        writer.put(initial_row(trial, sweep).replace(state="ERROR", attempts=1) for trial in sweep.trials)
        writer.close(done=True)
    words = "nothing to run, all 2 trials have ended (2 failed: `mixmo retry` queues them again)"
    for command in (("run", "sweep.yaml", "--yes"), ("submit", "sweep.yaml", *NOBODY, "--wait")):
        assert words in mixmo(*command, code=3).stderr


def test_a_job_says_all_that_was_asked() -> None:
    sweep = parse(SMALL, source="sweep.yaml")
    plain = Request(sweep=sweep, results="s3://lab/results")
    assert "--no-canary" not in plain.entrypoint
    bold = dataclasses.replace(plain, rehearse=False, retry_failed=True, data="s3://lab/data")
    assert bold.entrypoint.endswith("--results s3://lab/results --data s3://lab/data --retry-failed --no-canary")
    assert bold.digest != plain.digest


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--address", "ray://127.0.0.1:10001"], "http://127.0.0.1:8265"),
        (["--timeout", "5"], "--wait"),
        (["-S", "optim.lr=fast"], "optim.lr"),
    ],
)
def test_bad_usage_is_2(mixmo: Submitter, words: list[str], said: str) -> None:
    assert said in mixmo("submit", "sweep.yaml", *words, code=2).stderr


def test_images_that_are_not_in_the_bucket_are_missed_before_the_cluster_is_asked(
    tmp_path: Path, bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    mixmo = Submitter(tmp_path, SMALL.replace("digits", "cifar100"), keys)
    refused = mixmo("submit", "sweep.yaml", "-S", "data.dataset=cifar100", "--data", bucket, code=2).stderr
    assert "no cifar100" in refused
    assert "mixmo data get cifar100" in refused


HEAD = {"Alive": True, "NodeID": "a", "NodeManagerHostname": "head", "Resources": {"CPU": 0.0}}


def test_a_folder_is_refused_where_the_hosts_that_train_are_still_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: str
) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [HEAD])
    with pytest.raises(RefusedError, match=r"none is there yet(.|\n)*--results s3://BUCKET/results"):
        reach.prove(ResultStore.open(tmp_path))
    reach.prove(ResultStore.open(bucket))  # it is the same one for everybody
    monkeypatch.setattr("ray.nodes", lambda: [HEAD | {"Resources": {"CPU": 2.0}}])
    reach.prove(ResultStore.open(tmp_path))


def test_what_a_host_reads_is_the_token_or_why_there_is_none(tmp_path: Path) -> None:
    store = ResultStore.open(tmp_path / "here", create=True)
    store.folder.put(".reach-1", b"token")
    assert reach.read_back(store.uri, ".reach-1") == "token"
    assert reach.read_back(str(tmp_path / "there"), ".reach-1") == "it sees another folder of that name"
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in reach.read_back(str(tmp_path / "file"), ".reach-1")


def test_packaged_code_says_where_it_comes_from(tmp_path: Path) -> None:
    Origin("c0ffee" * 6 + "abcd", True).write(tmp_path)
    assert origin(tmp_path) == Origin("c0ffee" * 6 + "abcd", True)
    assert str(origin(tmp_path)) == "c0ffeec0ffee with local changes"
    assert (tmp_path / FILE).exists()
    assert origin(tmp_path / "nowhere") == Origin()


def test_code_in_an_environment_inside_a_repository_is_not_of_its_commit(tmp_path: Path) -> None:
    for words in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages/origin.py").write_text("")
    assert origin(tmp_path / "site-packages") == Origin()
