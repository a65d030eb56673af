"""What a cluster on AWS needs once: a bucket for results, and who may touch it. Again changes nothing that stands.

    python cluster/setup_aws.py --bucket my-results --region eu-west-3
    python cluster/setup_aws.py --bucket my-results --region eu-west-3 --delete

Made are the bucket, and for the head and the workers of cluster/gpu.yaml an IAM role with an instance profile each.
Workers run trials and may use the bucket, no more. The head may also launch and end the workers, as Ray's AWS provider
does. Credentials come from where AWS's own tools find them.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import boto3
import botocore.exceptions

from orchestrator.cli.guard import guarded
from orchestrator.errors import RefusedError, UnreachableError, UsageError

TAG = {"Key": "made-by", "Value": "mixmo"}
"""On all that is made here: nothing without it is changed or deleted."""
POLICY = "mixmo"
_MISSING = ("NoSuchEntity", "NoSuchBucket", "404", "NoSuchTagSet")
_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


@dataclass(frozen=True, slots=True)
class Setup:
    """What is to stand: names are those that cluster/gpu.yaml has."""

    bucket: str
    region: str
    name: str
    account: str
    partition: str

    @property
    def head(self) -> str:
        return f"{self.name}-head"

    @property
    def worker(self) -> str:
        return f"{self.name}-worker"

    def policy_of(self, role: str) -> dict[str, Any]:
        statements = self._results() + (self._workers() if role == self.head else [])
        return {"Version": "2012-10-17", "Statement": statements}

    def _results(self) -> list[dict[str, Any]]:
        """To list this bucket, and to read, write and delete what is in it: all that a store does."""
        bucket = f"arn:{self.partition}:s3:::{self.bucket}"
        return [
            _allow("ListResults", ["s3:ListBucket", "s3:GetBucketLocation"], bucket),
            _allow("UseResults", ["s3:GetObject", "s3:PutObject", "s3:DeleteObject"], f"{bucket}/*"),
        ]

    def _workers(self) -> list[dict[str, Any]]:
        """What Ray's AWS provider calls on the head. It ends and relabels only what a cluster has launched."""
        here = {"StringEquals": {"aws:RequestedRegion": self.region}}
        of_a_cluster = {"StringLike": {"aws:ResourceTag/ray-cluster-name": "*"}}
        instances = f"arn:{self.partition}:ec2:{self.region}:{self.account}:instance/*"
        look = [
            "Instances",
            "InstanceTypes",
            "InstanceTypeOfferings",
            "Images",
            "Subnets",
            "SecurityGroups",
            "KeyPairs",
        ]
        return [
            _allow("LookAround", [f"ec2:Describe{each}" for each in look], "*", here),
            _allow("LaunchWorkers", ["ec2:RunInstances"], "*", here),
            _allow("LabelNew", ["ec2:CreateTags"], instances, {"StringEquals": {"ec2:CreateAction": "RunInstances"}}),
            _allow("LabelOwn", ["ec2:CreateTags"], instances, of_a_cluster),
            _allow("EndWorkers", ["ec2:TerminateInstances"], instances, of_a_cluster),
            _allow(
                "GiveWorkersTheirRole", ["iam:PassRole"],
                f"arn:{self.partition}:iam::{self.account}:role/{self.worker}",
                {"StringEquals": {"iam:PassedToService": f"ec2.amazonaws.com{'.cn' * (self.partition == 'aws-cn')}"}},
            ),
            _allow(
                "FindImages", ["ssm:GetParameters"], f"arn:{self.partition}:ssm:{self.region}::parameter/aws/service/*"
            ),
        ]  # fmt: skip


def _allow(sid: str, actions: Sequence[str], resource: str, condition: Any = None) -> dict[str, Any]:
    statement = {"Sid": sid, "Effect": "Allow", "Action": list(actions), "Resource": resource}
    return statement | ({"Condition": condition} if condition else {})


TRUST = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}],
}


class Account:
    """An AWS account, and what is said of each step."""

    def __init__(self, region: str | None, say: Callable[[str], None]) -> None:
        session = boto3.Session(region_name=region)
        if session.region_name is None:
            raise UsageError("no region: give --region, as cluster/gpu.yaml has it, or set AWS_DEFAULT_REGION")
        self.region: str = session.region_name
        self._s3, self._iam = session.client("s3"), session.client("iam")
        self._sts, self._say = session.client("sts"), say

    def setup(self, bucket: str, name: str) -> Setup:
        _, partition, _, _, account, _ = self._sts.get_caller_identity()["Arn"].split(":", 5)
        return Setup(bucket=bucket, region=self.region, name=name, account=account, partition=partition)

    # Bucket

    def make_bucket(self, setup: Setup) -> None:
        standing = self._region_of(setup.bucket)
        if standing is None:
            place = {} if setup.region == "us-east-1" else {"LocationConstraint": setup.region}
            self._s3.create_bucket(Bucket=setup.bucket, **({"CreateBucketConfiguration": place} if place else {}))
        elif standing != setup.region:
            raise RefusedError(
                f"bucket {setup.bucket} is in {standing}, not in {setup.region}: traffic between regions is slow and "
                f"costs money. Give --region {standing}, here and in cluster/gpu.yaml, or another --bucket"
            )
        if self._is_empty(setup.bucket):  # ours from now on, also where a kill has kept the tag from it
            self._s3.put_bucket_tagging(Bucket=setup.bucket, Tagging={"TagSet": [TAG]})
        if not self._is_ours(setup.bucket):
            self._say(f"bucket {setup.bucket}: was there before, and was not made here; its settings stay as they are")
            return
        self._s3.put_public_access_block(
            Bucket=setup.bucket,
            PublicAccessBlockConfiguration=dict.fromkeys(
                ["BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets"], True
            ),
        )
        rule = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}
        self._s3.put_bucket_encryption(Bucket=setup.bucket, ServerSideEncryptionConfiguration={"Rules": [rule]})
        if self._s3.get_bucket_versioning(Bucket=setup.bucket).get("Status") == "Enabled":
            # Tables are replaced all the time, and every old version would be paid for.
            self._s3.put_bucket_versioning(Bucket=setup.bucket, VersioningConfiguration={"Status": "Suspended"})
        abort = {"ID": "abort-incomplete-uploads", "Status": "Enabled", "Filter": {"Prefix": ""},
                 "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 2}}  # fmt: skip
        self._s3.put_bucket_lifecycle_configuration(Bucket=setup.bucket, LifecycleConfiguration={"Rules": [abort]})
        made = "made" if standing is None else "is there"
        self._say(f"bucket {setup.bucket}: {made}, in {setup.region}, private, encrypted, without versions")

    def delete_bucket(self, bucket: str) -> None:
        """Raises RefusedError for one that has objects, or that was not made here."""
        if self._region_of(bucket) is None:
            self._say(f"bucket {bucket}: is not there")
            return
        if not self._is_ours(bucket):
            raise RefusedError(
                f"bucket {bucket} was not made here: it has no tag {TAG['Key']}={TAG['Value']}. It stays"
            )
        if not self._is_empty(bucket):
            raise RefusedError(
                f"bucket {bucket} has objects in it, and results are not deleted here. `mixmo rm SWEEP` removes "
                f"sweeps; `aws s3 rm --recursive s3://{bucket}` removes all. Then give the same command again"
            )
        self._s3.delete_bucket(Bucket=bucket)
        self._say(f"bucket {bucket}: deleted")

    def _region_of(self, bucket: str) -> str | None:
        """None where there is no such bucket. Raises RefusedError for somebody else's."""
        try:
            where = self._s3.get_bucket_location(Bucket=bucket)["LocationConstraint"]
        except botocore.exceptions.ClientError as error:
            if _code(error) in _MISSING:
                return None
            if _code(error) == "AccessDenied":
                raise RefusedError(
                    f"bucket {bucket} is somebody else's, or not yours to look at: choose another name"
                ) from error
            raise
        return "us-east-1" if where is None else {"EU": "eu-west-1"}.get(where, str(where))

    def _is_empty(self, bucket: str) -> bool:
        return not self._s3.list_objects_v2(Bucket=bucket, MaxKeys=1).get("KeyCount")

    def _is_ours(self, bucket: str) -> bool:
        with _if_there():
            return TAG in self._s3.get_bucket_tagging(Bucket=bucket)["TagSet"]
        return False

    # Roles

    def make_role(self, setup: Setup, role: str) -> None:
        """A role and the instance profile of the same name, with the policy that it is to have."""
        standing, wanted = self._policy(role), setup.policy_of(role)
        if standing is not None and _bucket_in(standing) != _bucket_in(wanted):
            raise RefusedError(
                f"role {role} is for {_bucket_in(standing)}. For a second bucket give --name, and that name in "
                "cluster/gpu.yaml; to move to another bucket, --delete the roles first"
            )
        with _unless("EntityAlreadyExists"):
            self._iam.create_role(
                RoleName=role, AssumeRolePolicyDocument=json.dumps(TRUST), Tags=[TAG],
                Description="Made by cluster/setup_aws.py of mixmo",
            )  # fmt: skip
        if TAG not in self._iam.list_role_tags(RoleName=role)["Tags"]:
            raise RefusedError(f"there is a role {role} that was not made here: give another --name")
        if standing != wanted:
            self._iam.put_role_policy(RoleName=role, PolicyName=POLICY, PolicyDocument=json.dumps(wanted))
        with _unless("EntityAlreadyExists"):
            self._iam.create_instance_profile(InstanceProfileName=role, Tags=[TAG])
        held = self._iam.get_instance_profile(InstanceProfileName=role)["InstanceProfile"]["Roles"]
        if not held:
            self._iam.add_role_to_instance_profile(InstanceProfileName=role, RoleName=role)
        elif [each["RoleName"] for each in held] != [role]:
            raise RefusedError(f"instance profile {role} has another role: it was not made here. Give another --name")
        how = "is there" if standing == wanted else "made" if standing is None else "changed"
        self._say(f"role and instance profile {role}: {how}")

    def delete_role(self, role: str) -> None:
        """The role and its profile. What was not made here stays."""
        with _if_there():
            if TAG not in self._iam.list_role_tags(RoleName=role)["Tags"]:
                raise RefusedError(f"role {role} was not made here: it stays")
        with _if_there():
            for held in self._iam.get_instance_profile(InstanceProfileName=role)["InstanceProfile"]["Roles"]:
                self._iam.remove_role_from_instance_profile(InstanceProfileName=role, RoleName=held["RoleName"])
        gone = []
        with _if_there():
            self._iam.delete_instance_profile(InstanceProfileName=role)
            gone.append("instance profile")
        with _if_there():
            self._iam.delete_role_policy(RoleName=role, PolicyName=POLICY)
        with _if_there():
            self._iam.delete_role(RoleName=role)
            gone.append("role")
        self._say(f"{' and '.join(reversed(gone)) or 'role'} {role}: {'deleted' if gone else 'is not there'}")

    def allow_spot(self) -> None:
        """The account's own role for spot machines, without which its first request for one fails. It stays."""
        with _unless("InvalidInput"):  # it is there
            self._iam.create_service_linked_role(AWSServiceName="spot.amazonaws.com")

    def _policy(self, role: str) -> dict[str, Any] | None:
        with _if_there():
            found = self._iam.get_role_policy(RoleName=role, PolicyName=POLICY)["PolicyDocument"]
            return dict(json.loads(found) if isinstance(found, str) else found)
        return None


def _bucket_in(policy: Mapping[str, Any]) -> str | None:
    found: list[str] = [str(each["Resource"]) for each in policy["Statement"] if each.get("Sid") == "ListResults"]
    return found[0] if found else None


def _code(error: botocore.exceptions.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def _unless(*codes: str) -> Iterator[None]:
    """Pass over these answers."""
    try:
        yield
    except botocore.exceptions.ClientError as error:
        if _code(error) not in codes:
            raise


def _if_there() -> Any:
    return _unless(*_MISSING)


@contextmanager
def _told() -> Iterator[None]:
    """AWS's faults in our words."""
    try:
        yield
    except (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError) as error:
        raise UsageError(
            f"{error}. Log in with `aws configure` or `aws sso login`, or set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY"
        ) from error  # fmt: skip
    except botocore.exceptions.ProfileNotFound as error:
        raise UsageError(f"{error}. Set AWS_PROFILE to one of `aws configure list-profiles`") from error
    except botocore.exceptions.ClientError as error:
        what = f"AWS refused {error.operation_name}: {error.response.get('Error', {}).get('Message') or _code(error)}"
        raise RefusedError(f"{what}. What was made so far stays; the same command goes on from there") from error
    except (botocore.exceptions.HTTPClientError, botocore.exceptions.ConnectionError) as error:
        raise UnreachableError(f"AWS cannot be reached: {error}. The same command goes on from here") from error


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    asked = parser.parse_args(arguments)
    if asked.delete_bucket and not asked.delete:
        parser.error("--delete-bucket goes with --delete")

    def say(line: str) -> None:
        print(line, flush=True)

    def carry_out() -> None:
        if not _BUCKET_NAME.fullmatch(asked.bucket):
            raise UsageError(
                f"--bucket {asked.bucket}: a bucket's name has 3 to 63 lower-case letters, digits, hyphens and dots, "
                "without s3://"
            )
        with _told():
            account = Account(asked.region, say)
            (_delete if asked.delete else _make)(account, account.setup(asked.bucket, asked.name), asked, say)

    return guarded(carry_out)


def _make(account: Account, setup: Setup, asked: argparse.Namespace, say: Callable[[str], None]) -> None:
    account.make_bucket(setup)
    for role in (setup.head, setup.worker):
        account.make_role(setup, role)
    with suppress(botocore.exceptions.ClientError):  # who may not make it has an administrator who did, or will be told
        account.allow_spot()
    named = "" if setup.name == "mixmo" else f", and {setup.head} and {setup.worker} as its instance profiles"
    say(f"next: write {setup.region} and {setup.bucket} into cluster/gpu.yaml{named}")
    say("then: make wheel && ray up cluster/gpu.yaml")


def _delete(account: Account, setup: Setup, asked: argparse.Namespace, say: Callable[[str], None]) -> None:
    for role in (setup.head, setup.worker):
        account.delete_role(role)
    if asked.delete_bucket:
        account.delete_bucket(setup.bucket)
    else:
        say(f"bucket {setup.bucket}: stays, with its results. --delete --delete-bucket deletes it once it is empty")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python cluster/setup_aws.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bucket", required=True, metavar="B", help="the bucket for results")
    parser.add_argument(
        "--region", metavar="R", help="where the cluster will be; else AWS_DEFAULT_REGION, the profile's"
    )
    parser.add_argument("--name", default="mixmo", help="of the roles: NAME-head and NAME-worker. [default: mixmo]")
    parser.add_argument("--delete", action="store_true", help="take the roles and profiles away; the bucket stays")
    parser.add_argument("--delete-bucket", action="store_true", help="with --delete: the bucket too, if it is empty")
    return parser


if __name__ == "__main__":
    sys.exit(main())
