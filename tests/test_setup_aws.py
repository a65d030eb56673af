"""cluster/setup_aws.py against moto's S3 and IAM on the loopback."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions
import made_bucket
import pytest

ROOT = Path(__file__).resolve().parent.parent
REGION = "eu-west-3"


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("setup_aws", ROOT / "cluster/setup_aws.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["setup_aws"] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


setup_aws = _script()


@pytest.fixture(scope="module")
def aws_server() -> Iterator[str]:
    with made_bucket.serve() as endpoint:
        yield endpoint


@pytest.fixture(autouse=True)
def aws(aws_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty account, in the environment."""
    import urllib.request

    urllib.request.urlopen(
        urllib.request.Request(f"http://{aws_server}/moto-api/reset", method="POST"), timeout=30
    ).close()  # fmt: skip
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{aws_server}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", made_bucket.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", made_bucket.SECRET)


def run(*words: str, code: int = 0) -> None:
    assert setup_aws.main(["--bucket", "lab-results", "--region", REGION, *words]) == code


def client(service: str) -> Any:
    return boto3.client(service, region_name=REGION)


def policy(role: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client("iam").get_role_policy(RoleName=role, PolicyName="mixmo")["PolicyDocument"][
        "Statement"
    ]
    return found


def state() -> str:
    """All that is there, as text to compare; lists come in no order."""
    s3, iam = client("s3"), client("iam")
    profiles = sorted(iam.list_instance_profiles()["InstanceProfiles"], key=lambda each: each["InstanceProfileName"])
    roles = sorted(each["RoleName"] for each in iam.list_roles()["Roles"])
    return json.dumps(
        [
            [each["Name"] for each in s3.list_buckets()["Buckets"]],
            [[each["InstanceProfileName"], [role["RoleName"] for role in each["Roles"]]] for each in profiles],
            [policy(each) for each in roles if each.startswith("mixmo")],
        ],
        sort_keys=True,
    )


def test_the_bucket_is_private_encrypted_unversioned_and_forgets_torn_uploads(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run()
    s3 = client("s3")
    assert s3.get_bucket_location(Bucket="lab-results")["LocationConstraint"] == REGION
    block = s3.get_public_access_block(Bucket="lab-results")["PublicAccessBlockConfiguration"]
    assert len(block) == 4
    assert all(block.values())
    rules = s3.get_bucket_encryption(Bucket="lab-results")["ServerSideEncryptionConfiguration"]["Rules"]
    assert rules[0]["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"
    assert "Status" not in s3.get_bucket_versioning(Bucket="lab-results")
    (rule,) = s3.get_bucket_lifecycle_configuration(Bucket="lab-results")["Rules"]
    assert rule["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] == 2
    assert "eu-west-3 and lab-results into cluster/gpu.yaml" in capsys.readouterr().out


def test_workers_may_use_the_bucket_and_nothing_else() -> None:
    run()
    statements = policy("mixmo-worker")
    assert {each["Resource"] for each in statements} == {"arn:aws:s3:::lab-results", "arn:aws:s3:::lab-results/*"}
    assert all(action.startswith("s3:") for each in statements for action in each["Action"])
    assert policy("mixmo-head")[:2] == statements
    for role in ("mixmo-head", "mixmo-worker"):
        profile = client("iam").get_instance_profile(InstanceProfileName=role)["InstanceProfile"]
        assert [each["RoleName"] for each in profile["Roles"]] == [role]


def test_the_head_passes_on_only_the_workers_role_and_ends_only_what_a_cluster_launched() -> None:
    run()
    by_name = {each["Sid"]: each for each in policy("mixmo-head")}
    assert by_name["GiveWorkersTheirRole"]["Resource"].endswith(":role/mixmo-worker")
    assert by_name["EndWorkers"]["Condition"] == {"StringLike": {"aws:ResourceTag/ray-cluster-name": "*"}}
    assert not [each for each in policy("mixmo-head") if "*" in each["Action"] or "ec2:*" in each["Action"]]


def test_the_bucket_goes_only_with_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        setup_aws.main(["--bucket", "lab-results", "--region", REGION, "--delete-bucket"])
    assert "goes with --delete" in capsys.readouterr().err


def test_again_changes_nothing() -> None:
    run()
    before = state()
    run()
    assert state() == before


def test_a_policy_that_somebody_widened_is_put_right() -> None:
    run()
    before = state()
    wider = [*policy("mixmo-worker"), {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]
    client("iam").put_role_policy(
        RoleName="mixmo-worker", PolicyName="mixmo",
        PolicyDocument=json.dumps({"Version": "2012-10-17", "Statement": wider}),
    )  # fmt: skip
    run()
    assert state() == before


@pytest.mark.slow
def test_a_kill_anywhere_in_between_is_finished_by_the_same_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off at every request in turn, each time from what the cut before has left."""
    run()
    whole = state()
    run("--delete", "--delete-bucket")
    call = botocore.client.BaseClient._make_api_call

    def until(limit: int) -> int:
        made = 0

        def cut(self: Any, operation: str, words: Any) -> Any:
            nonlocal made
            made += 1
            if made > limit:
                raise KeyboardInterrupt
            return call(self, operation, words)

        with monkeypatch.context() as patch:
            patch.setattr(botocore.client.BaseClient, "_make_api_call", cut)
            code: int = setup_aws.main(["--bucket", "lab-results", "--region", REGION])
        return code

    limit = 0
    while until(limit) != 0:
        limit += 1
    assert limit > 15
    assert state() == whole


def test_delete_takes_the_roles_away_and_leaves_the_bucket() -> None:
    run()
    client("s3").put_object(Bucket="lab-results", Key="sweeps/x", Body=b"weeks of work")
    run("--delete")
    assert not [each for each in client("iam").list_roles()["Roles"] if each["RoleName"].startswith("mixmo")]
    assert not client("iam").list_instance_profiles()["InstanceProfiles"]
    assert client("s3").get_object(Bucket="lab-results", Key="sweeps/x")["Body"].read() == b"weeks of work"
    run("--delete")  # nothing is left to delete


def test_a_bucket_with_results_is_never_deleted(capsys: pytest.CaptureFixture[str]) -> None:
    run()
    client("s3").put_object(Bucket="lab-results", Key="sweeps/x", Body=b"weeks of work")
    run("--delete", "--delete-bucket", code=6)
    assert "aws s3 rm --recursive s3://lab-results" in capsys.readouterr().err
    client("s3").delete_object(Bucket="lab-results", Key="sweeps/x")
    run("--delete", "--delete-bucket")
    assert client("s3").list_buckets()["Buckets"] == []


def test_a_bucket_that_was_there_keeps_its_settings() -> None:
    s3 = client("s3")
    s3.create_bucket(Bucket="lab-results", CreateBucketConfiguration={"LocationConstraint": REGION})
    s3.put_bucket_versioning(Bucket="lab-results", VersioningConfiguration={"Status": "Enabled"})
    s3.put_object(Bucket="lab-results", Key="of/others", Body=b"")
    run()
    assert s3.get_bucket_versioning(Bucket="lab-results")["Status"] == "Enabled"
    with pytest.raises(botocore.exceptions.ClientError, match="NoSuchLifecycleConfiguration"):
        s3.get_bucket_lifecycle_configuration(Bucket="lab-results")
    run("--delete", "--delete-bucket", code=6)
    assert s3.list_buckets()["Buckets"]


def test_an_empty_bucket_that_was_there_is_taken() -> None:
    client("s3").create_bucket(Bucket="lab-results", CreateBucketConfiguration={"LocationConstraint": REGION})
    run()
    assert client("s3").get_public_access_block(Bucket="lab-results")


def test_a_role_of_somebody_else_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    client("iam").create_role(RoleName="mixmo-head", AssumeRolePolicyDocument="{}")
    run(code=6)
    assert "not made here: give another --name" in capsys.readouterr().err
    run("--delete", code=6)
    assert client("iam").get_role(RoleName="mixmo-head")
    run("--name", "lab")
    assert client("iam").get_role(RoleName="lab-head")


def test_a_second_bucket_needs_names_of_its_own() -> None:
    run()
    before = policy("mixmo-worker")
    assert setup_aws.main(["--bucket", "other-results", "--region", REGION]) == 6
    assert policy("mixmo-worker") == before


def test_a_bucket_elsewhere_is_refused_with_its_region(capsys: pytest.CaptureFixture[str]) -> None:
    run()
    assert setup_aws.main(["--bucket", "lab-results", "--region", "us-east-1"]) == 6
    assert "--region eu-west-3" in capsys.readouterr().err


@pytest.mark.parametrize("bucket", ["s3://lab", "Lab", "a", "lab_results"])
def test_a_name_that_is_none_of_a_bucket_is_bad_usage(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert setup_aws.main(["--bucket", bucket, "--region", REGION]) == 2
    assert "without s3://" in capsys.readouterr().err


def test_without_credentials_or_region_it_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup_aws.main(["--bucket", "lab-results"]) == 2
    assert "AWS_DEFAULT_REGION" in capsys.readouterr().err
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    run(code=2)
    assert "aws configure" in capsys.readouterr().err


def test_an_aws_out_of_reach_is_7(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    run(code=7)
    assert "cannot be reached" in capsys.readouterr().err
