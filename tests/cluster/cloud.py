"""EC2, IAM and S3 for a test: moto answers, and what is launched there are hosts of the test's own (hosts.py)."""

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import hosts
from hosts import Host, until
from laptop import installed, key, prepare, say
from mapped import HOST

PORT = 5000
REGION = "us-west-2"
"""As in cluster/gpu.yaml."""
ENVIRONMENT = {
    "AWS_ENDPOINT_URL": f"http://{hosts.LAPTOP}:{PORT}", "AWS_ACCESS_KEY_ID": "testkey",
    "AWS_SECRET_ACCESS_KEY": "hush-hush-testsecret", "AWS_EC2_METADATA_DISABLED": "true",
}  # fmt: skip
"""With which laptop and hosts find it. The hosts have credentials, and no metadata to give them those of a role."""


@dataclass(frozen=True, slots=True)
class Machine:
    id: str
    kind: str
    """Of those in cluster/gpu.yaml."""
    instance_type: str
    spot: bool
    runs: bool


class Cloud:
    """Boots a host for each machine that is launched, and takes the power from it when the machine is ended."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ec2: Any = boto3.client("ec2", region_name=REGION)
        self._hosts: dict[str, Host] = {}
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="cloud", daemon=True)
        self._thread.start()

    def machines(self) -> list[Machine]:
        """All that were ever launched. Raises what has kept a host from booting."""
        if self._failed:
            raise self._failed
        found = self._ec2.describe_instances()["Reservations"]
        return [_machine(each) for group in found for each in group["Instances"]]

    def running(self) -> list[Machine]:
        return [each for each in self.machines() if each.runs]

    def host(self, machine: Machine) -> Host:
        return self._hosts[machine.id]

    def name(self, machine: Machine) -> str:
        """Of its host; nothing as long as that boots."""
        return self._hosts[machine.id].name if machine.id in self._hosts else ""

    def end(self, machine: Machine) -> None:
        """As the cloud itself ends a spot machine."""
        self._ec2.terminate_instances(InstanceIds=[machine.id])

    def all_off(self) -> bool:
        return all(host.is_off() for host in self._hosts.values())

    def _serve(self) -> None:
        try:
            while True:
                for machine in self.machines():
                    if machine.runs and machine.id not in self._hosts:
                        self._boot(machine)
                    if not machine.runs and machine.id in self._hosts and not self._hosts[machine.id].is_off():
                        self._hosts[machine.id].kill()
                        say(f"  {self._hosts[machine.id].name} is off")
                time.sleep(1)
        except BaseException as error:
            self._failed = error

    def _boot(self, machine: Machine) -> None:
        """A new host each time, as a new machine is new. Its address is told once it can be used."""
        number = len(self._hosts)
        host = Host(number, self._folder / f"host{number}", ENVIRONMENT)
        host.plug_in(key())
        with (host.root / ".ssh/authorized_keys").open("a") as authorized:
            authorized.write(self._public_key(machine))  # as EC2 does: with this one Ray logs in
        until(host.answers, f"{host.name} answers over SSH", 120)
        prepare(host)
        (installed(host).parent / "mapped.pth").write_text(f"{Path(__file__).parent}\n")
        self._hosts[machine.id] = host
        self._ec2.create_tags(Resources=[machine.id], Tags=[{"Key": HOST, "Value": host.address}])
        say(f"  {host.name} is up: {machine.kind}, {machine.instance_type}{', spot' if machine.spot else ''}")

    def _public_key(self, machine: Machine) -> str:
        (found,) = self._ec2.describe_instances(InstanceIds=[machine.id])["Reservations"][0]["Instances"]
        pairs = self._ec2.describe_key_pairs(KeyNames=[found["KeyName"]], IncludePublicKey=True)["KeyPairs"]
        return f"{pairs[0]['PublicKey'].strip()}\n"


def _machine(found: Any) -> Machine:
    tags = {tag["Key"]: tag["Value"] for tag in found.get("Tags", [])}
    return Machine(
        found["InstanceId"], tags["ray-user-node-type"], found["InstanceType"],
        found.get("InstanceLifecycle") == "spot", found["State"]["Name"] in ("pending", "running"),
    )  # fmt: skip


@contextlib.contextmanager
def server() -> Iterator[None]:
    """moto, at an address that hosts and laptop reach, and nobody else."""
    words = [sys.executable, "-m", "moto.server", "-H", hosts.LAPTOP, "-p", str(PORT)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: _answers(process), "moto answers", 120)
        yield
    finally:
        process.kill()
        process.wait()


def _answers(process: "subprocess.Popen[bytes]") -> bool:
    import socket

    assert process.poll() is None, f"moto ended with {process.returncode}"
    with contextlib.suppress(OSError), socket.create_connection((hosts.LAPTOP, PORT), timeout=1):
        return True
    return False
