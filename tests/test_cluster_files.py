"""cluster/*.yaml, held to Ray's own schema and, on AWS, to its own node provider against moto's EC2 on the loopback."""

import importlib
import json
import os
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import made_bucket
import pytest
from test_setup_aws import setup_aws

from orchestrator.roster import MARKET, Needs, Node, Offer, coming_of

ROOT = Path(__file__).resolve().parent.parent
REGION = "us-west-2"
FILES = ["gpu", "onprem"]


@pytest.fixture(scope="module")
def aws_server() -> Iterator[str]:
    with made_bucket.serve() as endpoint:
        yield endpoint


@pytest.fixture
def aws(aws_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """An account in which setup_aws.py has been."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{aws_server}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", made_bucket.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", made_bucket.SECRET)
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray keeps the key pair that it makes
    _post(aws_server, "reset")
    _post(aws_server, "reset-auth", b"1000000")
    assert setup_aws.main(["--bucket", "lab-results", "--region", REGION]) == 0
    return aws_server


def _post(server: str, what: str, body: bytes = b"") -> None:
    words = {"Content-Type": "text/plain"}
    request = urllib.request.Request(f"http://{server}/moto-api/{what}", data=body, headers=words, method="POST")
    urllib.request.urlopen(request, timeout=30).close()


def read(name: str) -> dict[str, Any]:
    yaml = importlib.import_module("yaml")  # Ray's own reader
    found: dict[str, Any] = yaml.safe_load((ROOT / f"cluster/{name}.yaml").read_text())
    return found


def prepared(name: str) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config

    found: dict[str, Any] = prepare_config(read(name))
    return found


# ------------------------------------------------------------------------------------------------ what the files say


@pytest.mark.parametrize("name", FILES)
def test_ray_takes_it(name: str) -> None:
    from ray.autoscaler._private.util import validate_config

    validate_config(prepared(name))


@pytest.mark.parametrize("name", FILES)
def test_the_schema_would_refuse_a_slip(name: str) -> None:
    from ray.autoscaler._private.util import validate_config

    with pytest.raises(Exception, match="Additional properties are not allowed"):
        validate_config(prepared(name) | {"idle_timeout": 5})


@pytest.mark.parametrize("name", FILES)
def test_the_dashboard_is_on_loopback_and_ray_asks_for_the_token_that_is_shipped(name: str) -> None:
    config = read(name)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    (start,) = [each for each in config["head_start_ray_commands"] if "ray start" in each]
    assert "--dashboard-host=127.0.0.1" in start
    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        assert command.startswith(". ~/mixmo/cluster/environment.sh;")


@pytest.mark.parametrize("name", FILES)
def test_what_it_ships_is_there_or_made_by_make_wheel(name: str) -> None:
    local = set(read(name)["file_mounts"].values())
    assert local == {"dist", "cluster", "~/.ray/auth_token"}
    for script in ("environment.sh", "install.sh"):
        assert subprocess.run(["bash", "-n", ROOT / "cluster" / script], check=False).returncode == 0
    assert os.access(ROOT / "cluster/install.sh", os.X_OK)


def test_the_environment_is_what_the_hosts_need(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "mixmo").mkdir(parents=True)
    (home / "mixmo/bucket").write_text("lab-results\n")
    (home / "ray_bootstrap_config.yaml").write_text('{"provider": {"type": "aws", "region": "eu-west-3"}}')
    printed = subprocess.run(
        ["bash", "-c", f". {ROOT}/cluster/environment.sh; env"], env={"PATH": os.environ["PATH"], "HOME": str(home)},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = dict(line.split("=", 1) for line in printed.splitlines() if "=" in line)
    assert found["RAY_AUTH_MODE"] == "token"
    assert found["PATH"].startswith(f"{home}/mixmo/venv/bin:")
    assert found["MIXMO_RESULTS"] == "s3://lab-results/results?region=eu-west-3"
    period, times = (int(found[f"RAY_health_check_{each}"]) for each in ("period_ms", "failure_threshold"))
    assert period * times >= 120_000  # a shorter cut costs no trial


def test_of_the_wheels_that_were_ever_shipped_a_host_installs_the_last_and_once(tmp_path: Path) -> None:
    """rsync deletes nothing on the host. Of pip, which would go to the Internet, only what it is told is looked at."""
    dist, python = tmp_path / "mixmo/dist", tmp_path / "mixmo/venv/bin/python"
    for folder in (dist, python.parent, tmp_path / ".ray"):
        folder.mkdir(parents=True)
    for version in ("1.0", "1.1"):
        (dist / f"mixmo_sweeps-{version}-py3-none-any.whl").write_text(version)
    (dist / "wheel").write_text("mixmo_sweeps-1.1-py3-none-any.whl\n")
    (dist / "constraints.txt").write_text("")
    (tmp_path / ".ray/auth_token").write_text("a token")
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n')
    python.chmod(0o755)
    for _ in range(2):
        env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
        subprocess.run([ROOT / "cluster/install.sh"], env=env, check=True, timeout=60)
    told = (tmp_path / "told").read_text().splitlines()
    wheel = "dist/mixmo_sweeps-1.1-py3-none-any.whl"
    assert [line.split()[-1] for line in told] == [f"{wheel}[optuna]", wheel]


def test_only_region_and_bucket_are_edited_by_hand_in_gpu_yaml() -> None:
    lines = (ROOT / "cluster/gpu.yaml").read_text().splitlines()
    edited = [line for line in lines if re.search(r"# EDIT", line)]
    assert [line.split("#")[0].strip() for line in edited] == [
        "region: us-west-2",
        "- echo my-bucket > ~/mixmo/bucket",
    ]
    rest = "\n".join(line for line in lines if line not in edited and not line.lstrip().startswith("#"))
    assert "us-west-2" not in rest
    assert "my-bucket" not in rest


def test_the_head_never_trains() -> None:
    config = prepared("gpu")
    head = config["available_node_types"][config["head_node_type"]]
    assert (head["resources"], head["max_workers"]) == ({"CPU": 0}, 0)
    (start,) = [each for each in read("onprem")["head_start_ray_commands"] if "ray start" in each]
    assert "--num-cpus=0 --num-gpus=0 " in start
    assert "RAY_enable_autoscaler_v2=0" in start  # else it leaves one host out


def test_workers_scale_from_zero_on_spot_and_gangs_of_machines_are_on_demand() -> None:
    types = prepared("gpu")["available_node_types"]
    workers = {name: each for name, each in types.items() if name != "head"}
    assert {each["min_workers"] for each in workers.values()} == {0}
    spot = {
        name: each["node_config"].get("InstanceMarketOptions", {}).get("MarketType") for name, each in types.items()
    }
    assert spot == {"head": None, "spot_gpu": "spot", "on_demand_gpu": None}
    assert {name: each["labels"][MARKET] for name, each in workers.items()} == {
        "spot_gpu": "spot", "on_demand_gpu": "on-demand"
    }  # fmt: skip


def test_every_machine_asks_for_version_2_of_the_metadata_service_and_encrypts_its_disk() -> None:
    for name, each in prepared("gpu")["available_node_types"].items():
        machine = each["node_config"]
        assert machine["MetadataOptions"]["HttpTokens"] == "required", name
        assert all(disk["Ebs"]["Encrypted"] for disk in machine["BlockDeviceMappings"])
        assert machine["IamInstanceProfile"] == {"Name": "mixmo-head" if name == "head" else "mixmo-worker"}


# ---------------------------------------------------------------------- Ray's own provider, provider calls and no SSH


@pytest.mark.slow
def test_rays_provider_launches_labels_and_ends_machines_with_no_more_than_the_heads_role(aws: str) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    config = _bootstrapped(AWSNodeProvider)
    types = config["available_node_types"]
    assert {name: each["resources"].get("GPU") for name, each in types.items()} == {
        "head": None, "spot_gpu": 1, "on_demand_gpu": 4,
    }  # fmt: skip
    assert types["head"]["resources"]["CPU"] == 0
    assert "accelerator_type:L4" in types["spot_gpu"]["resources"]
    _check_that_nothing_but_ssh_is_open_to_the_world(types)

    _post(aws, "reset-auth", b"0")  # from here on, policies count
    try:
        provider = AWSNodeProvider(config["provider"] | {"aws_credentials": _role("mixmo-head", aws)}, "mixmo")
        for name in ("spot_gpu", "on_demand_gpu"):
            made = provider.create_node(types[name]["node_config"], _tags(name), 1)
            assert len(made) == 1
        nodes = provider.non_terminated_nodes({})
        assert len(nodes) == 2
        provider.set_node_tags(nodes[0], {"ray-node-status": "up-to-date"})
        assert provider.node_tags(nodes[0])["ray-node-status"] == "up-to-date"
        provider.terminate_nodes(nodes)
        assert provider.non_terminated_nodes({}) == []

        worker = AWSNodeProvider(config["provider"] | {"aws_credentials": _role("mixmo-worker", aws)}, "mixmo")
        with pytest.raises(Exception, match="not authorized to perform: ec2:RunInstances"):
            worker.ec2.meta.client.run_instances(
                ImageId="ami-12345678", InstanceType="g6.xlarge", MinCount=1, MaxCount=1
            )
    finally:
        _post(aws, "reset-auth", b"1000000")
    ec2 = boto3.client("ec2", region_name=REGION)
    launched = [each for group in ec2.describe_instances()["Reservations"] for each in group["Instances"]]
    assert {each["State"]["Name"] for each in launched} == {"terminated"}
    assert sorted((each["InstanceType"], each.get("InstanceLifecycle")) for each in launched) == [
        ("g6.12xlarge", None), ("g6.xlarge", "spot"),
    ]  # fmt: skip


# A sweep's gangs, what each needs, and what is to be launched for them.
LAUNCHED: list[tuple[int, Needs, dict[str, int]]] = [
    (1, Needs(gpus_per_worker=1), {"spot_gpu": 1}),
    (4, Needs(gpus_per_worker=1), {"spot_gpu": 4}),  # which one machine on demand would hold
    (8, Needs(gpus_per_worker=0.25), {"spot_gpu": 2}),
    (99, Needs(gpus_per_worker=1), {"spot_gpu": 16}),
    (24, Needs(cpus_per_worker=2), {"spot_gpu": 12}),
    (3, Needs(gpus_per_worker=1, workers=4), {"spot_gpu": 12}),
    (4, Needs(gpus_per_worker=1, spot=False), {"on_demand_gpu": 1}),
    (2, Needs(gpus_per_worker=1, workers=4, spot=False), {"on_demand_gpu": 2}),
    (1, Needs(gpus_per_worker=4), {"on_demand_gpu": 1}),  # no spot machine has so many
]


@pytest.mark.slow
def test_which_machines_rays_autoscaler_launches_for_gangs(aws: str) -> None:
    """Its decision alone, on all that a sweep's gangs ask for: Ray Train asks for a group of its own each, and beside
    it for the workers of all groups together.
    """
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint, GangResourceRequest

    config = AWSNodeProvider.fillout_available_node_types_resources(prepared("gpu"))
    scaling = AutoscalingConfig(config, skip_content_hash=True)
    offer = Offer((Node(0),), *coming_of(config))
    for most, needs, launched in LAUNCHED:
        gangs = min(most, offer.room(needs))
        workers = [_request(needs, offer)] * needs.workers
        request = SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=scaling.get_node_type_configs(),
            max_num_nodes=scaling.get_max_num_nodes(),
            gang_resource_requests=[GangResourceRequest(requests=workers) for _ in range(gangs)],
            cluster_resource_constraints=[
                ClusterResourceConstraint(resource_requests=ResourceRequestUtil.group_by_count(workers * gangs))
            ],
        )
        reply = ResourceDemandScheduler().schedule(request)
        assert {each.instance_type: each.count for each in reply.to_launch} == launched, needs
        assert not reply.infeasible_gang_resource_requests


def _request(needs: Needs, offer: Offer) -> Any:
    """A worker, as Ray asks its autoscaler for it."""
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.common_pb2 import LabelSelectorOperator

    bundle = {"CPU": needs.cpus_per_worker, "GPU": needs.gpus_per_worker}
    differs = LabelSelectorOperator.LABEL_OPERATOR_NOT_IN
    market = offer.market(needs) or {}
    selectors = [[(label, differs, [value.removeprefix("!")]) for label, value in market.items()]]
    asked = {name: amount for name, amount in bundle.items() if amount}
    return ResourceRequestUtil.make(asked, label_selectors=selectors if market else None)


def _check_that_nothing_but_ssh_is_open_to_the_world(types: dict[str, Any]) -> None:
    ((group,),) = {tuple(each["node_config"]["SecurityGroupIds"]) for each in types.values()}
    (found,) = boto3.client("ec2", region_name=REGION).describe_security_groups(GroupIds=[group])["SecurityGroups"]
    assert found["GroupName"] == "mixmo"
    open_to_all = [rule for rule in found["IpPermissions"] if rule.get("IpRanges") or rule.get("Ipv6Ranges")]
    assert [(rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) for rule in open_to_all] == [("tcp", 22, 22)]
    others = [rule for rule in found["IpPermissions"] if rule not in open_to_all]
    assert all(pair["GroupId"] == group for rule in others for pair in rule["UserIdGroupPairs"])


def _bootstrapped(provider: Any) -> dict[str, Any]:
    """As `ray up` makes it, before it launches anything. With internal addresses: nobody is to connect to others."""
    config = prepared("gpu")
    config["provider"]["use_internal_ips"] = True
    found: dict[str, Any] = provider.bootstrap_config(provider.fillout_available_node_types_resources(config))
    return found


def _tags(name: str) -> dict[str, str]:
    return {
        "ray-node-name": f"ray-mixmo-{name}", "ray-node-type": "worker", "ray-user-node-type": name,
        "ray-launch-config": "0", "ray-node-status": "uninitialized",
    }  # fmt: skip


def _role(name: str, server: str) -> dict[str, str]:
    """Credentials of a role, as a machine with its instance profile has them. moto asks whether an action is allowed at
    all, and not upon what or when: resources and conditions are left out.
    """
    _post(server, "reset-auth", b"1000000")
    iam = boto3.client("iam", region_name=REGION)
    policy = iam.get_role_policy(RoleName=name, PolicyName="mixmo")["PolicyDocument"]
    for statement in policy["Statement"]:
        statement.pop("Condition", None)
        statement["Resource"] = "*"
    iam.put_role_policy(RoleName=name, PolicyName="mixmo", PolicyDocument=json.dumps(policy))
    sts = boto3.client("sts", region_name=REGION)
    account = sts.get_caller_identity()["Account"]
    given = sts.assume_role(RoleArn=f"arn:aws:iam::{account}:role/{name}", RoleSessionName="test")["Credentials"]
    _post(server, "reset-auth", b"0")
    return {
        "aws_access_key_id": given["AccessKeyId"], "aws_secret_access_key": given["SecretAccessKey"],
        "aws_session_token": given["SessionToken"],
    }  # fmt: skip
