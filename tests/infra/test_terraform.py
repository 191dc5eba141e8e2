"""Proves that infra/terraform can be applied, keeps to what it says, drifts nowhere and goes away.

Against a local AWS API server, which knows neither money nor time: what it cannot show is whether
real services start (MLflow's container, the database), and whether the policies are enough.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra" / "terraform"
TEXT = "\n".join(at.read_text(encoding="utf-8") for at in sorted(FOLDER.glob("*.tf")))
MIRROR = "OMNIFER_TERRAFORM_PLUGINS"
"""Names a folder that holds the AWS provider, for machines that cannot fetch it."""


def test_files__hold_nothing_of_an_account() -> None:
    assert not re.search(r"\b(ami|subnet|sg|vpc|eni)-[0-9a-f]{8,}", TEXT)
    assert not re.search(r"\b\d{12}\b|AKIA[0-9A-Z]{12}", TEXT)
    assert not re.search(r'(?i)(password|secret|token)\s*=\s*"', TEXT)


def test_files__no_policy_allows_everything() -> None:
    allowed = re.sub(r'effect\s*= "Deny"\s*actions\s*= \["s3:\*"\]', "", TEXT)
    assert not re.search(r'"\w+:\*"|actions\s*=\s*\["\*"\]', allowed)


def terraform() -> str:
    found = shutil.which("terraform")
    if found is None:
        pytest.skip("terraform is not installed")
    if MIRROR not in os.environ and not (Path.home() / ".terraform.d" / "plugins").is_dir():
        pytest.skip(f"{MIRROR} is not set: the AWS provider is not at hand")
    return found


@pytest.fixture(scope="module")
def cloud() -> Iterator[str]:
    """A local AWS API server that knows Amazon's own policies."""
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as env:
        env.setenv("MOTO_IAM_LOAD_MANAGED_POLICIES", "true")
        env.setenv("AWS_ACCESS_KEY_ID", "testing")
        env.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        env.setenv("AWS_DEFAULT_REGION", "us-east-1")
        env.delenv("AWS_PROFILE", raising=False)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        env.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        yield f"http://{host}:{port}"
        server.stop()


Terraform = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cloud: str) -> Terraform:
    """Runs terraform in a copy of the files, with the variables of the test."""
    program = terraform()
    root = tmp_path_factory.mktemp("tf")
    at = root / "infra" / "terraform"
    shutil.copytree(FOLDER, at, ignore=shutil.ignore_patterns(".terraform*", "*.tfstate*"))
    shutil.copy(ROOT / "cluster.yaml", root)
    values = {
        "region": "us-east-1",
        "sources_bucket": "faces-in",
        "runs_bucket": "faces-out",
        "ami": "ami-0123456789abcdef0",
        "mlflow_image": "omnifer-mlflow:0.1.0",
        "disposable": True,
        "endpoint": cloud,
    }
    (at / "test.auto.tfvars.json").write_text(json.dumps(values))
    env = {name: value for name, value in os.environ.items() if name != "TF_CLI_CONFIG_FILE"}
    env |= {"CHECKPOINT_DISABLE": "1", "TF_IN_AUTOMATION": "1"}

    def run(*arguments: str, ok: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [program, *arguments], cwd=at, env=env, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == ok, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    mirror = os.environ.get(MIRROR)
    run("init", "-input=false", *([f"-plugin-dir={mirror}"] if mirror else []))
    return run


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_terraform__applies_drifts_nowhere_and_is_gone(run: Terraform) -> None:
    run("fmt", "-check")
    run("validate")
    run("apply", "-auto-approve", "-input=false")
    outputs = json.loads(run("output", "-json").stdout)
    check_buckets()
    check_roles()
    check_network()
    check_database()
    check_cluster_yaml(outputs["cluster_yaml"]["value"])
    assert outputs["mlflow_uri"]["value"] == "http://mlflow.omnifer.internal:5000"
    assert outputs["runs"]["value"] == "s3://faces-out/runs"
    run("plan", "-detailed-exitcode", "-input=false")  # 2 would be a difference
    run("destroy", "-auto-approve", "-input=false")
    assert client("s3").list_buckets()["Buckets"] == []
    assert json.loads(run("show", "-json").stdout).get("values") is None


def client(service: str) -> Any:
    import boto3

    return boto3.client(service)


def check_buckets() -> None:
    s3 = client("s3")
    assert {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]} == {"faces-in", "faces-out"}
    for name in ("faces-in", "faces-out"):
        assert s3.get_bucket_versioning(Bucket=name)["Status"] == "Enabled"
        block = s3.get_public_access_block(Bucket=name)["PublicAccessBlockConfiguration"]
        assert set(block.values()) == {True}
        rules = s3.get_bucket_encryption(Bucket=name)["ServerSideEncryptionConfiguration"]["Rules"]
        assert rules[0]["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"
        (rule,) = s3.get_bucket_lifecycle_configuration(Bucket=name)["Rules"]
        assert rule["NoncurrentVersionExpiration"]["NoncurrentDays"] == 30
        (denied,) = json.loads(s3.get_bucket_policy(Bucket=name)["Policy"])["Statement"]
        assert denied["Effect"] == "Deny"
        assert denied["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}


def policies(role: str) -> list[dict[str, Any]]:
    """All statements of a role's own policies."""
    iam, found = client("iam"), []
    for name in iam.list_role_policies(RoleName=role)["PolicyNames"]:
        document = iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"]
        found += document["Statement"]
    return found


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def check_roles() -> None:
    """Nodes write runs only; workers start nothing; every star has a condition or only looks."""
    writes = {"s3:PutObject", "s3:DeleteObject"}
    for role in ("omnifer-head", "omnifer-worker"):
        written = {
            resource
            for statement in policies(role)
            if writes & set(listed(statement["Action"]))
            for resource in listed(statement["Resource"])
        }
        assert written == {"arn:aws:s3:::faces-out/runs/*"}
    worker = {action for s in policies("omnifer-worker") for action in listed(s["Action"])}
    assert {action.split(":")[0] for action in worker} == {"s3"}
    for statement in policies("omnifer-head"):
        actions = listed(statement["Action"])
        if "*" in listed(statement["Resource"]):
            assert all(action.startswith("ec2:Describe") for action in actions)
        if "ec2:TerminateInstances" in actions:
            tag = {"ec2:ResourceTag/ray-cluster-name": "omnifer"}
            assert statement["Condition"]["StringEquals"] == tag
        if "iam:PassRole" in actions:
            (passed,) = listed(statement["Resource"])
            assert passed.endswith(":role/omnifer-worker")
    served = [
        resource for s in policies("omnifer-mlflow-serve") for resource in listed(s["Resource"])
    ]
    assert sorted(served) == ["arn:aws:s3:::faces-out", "arn:aws:s3:::faces-out/mlflow/*"]


def check_network() -> None:
    ec2 = client("ec2")
    (endpoint,) = ec2.describe_vpc_endpoints()["VpcEndpoints"]
    assert endpoint["ServiceName"].endswith(".s3")
    assert endpoint["VpcEndpointType"] == "Gateway"
    groups = [
        group
        for group in ec2.describe_security_groups()["SecurityGroups"]
        if group["GroupName"].startswith("omnifer-")
    ]
    assert {group["GroupName"] for group in groups} == {
        "omnifer-nodes", "omnifer-mlflow", "omnifer-database",
    }  # fmt: skip
    opened = [rule for group in groups for rule in group["IpPermissions"]]
    assert len(opened) == 3
    assert all(rule["UserIdGroupPairs"] and not rule["IpRanges"] for rule in opened)


def check_database() -> None:
    (database,) = client("rds").describe_db_instances()["DBInstances"]
    assert database["StorageEncrypted"] is True
    assert database["PubliclyAccessible"] is False
    secret = database["MasterUserSecret"]["SecretArn"]
    tasks = client("ecs")
    (family,) = tasks.list_task_definitions()["taskDefinitionArns"]
    (container,) = tasks.describe_task_definition(taskDefinition=family)["taskDefinition"][
        "containerDefinitions"
    ]
    assert container["secrets"] == [{"name": "PGPASSWORD", "valueFrom": f"{secret}:password::"}]
    assert not any("PASSWORD" in setting["name"] for setting in container["environment"])


def check_cluster_yaml(text: str) -> None:
    """What `ray up` reads, filled with what was made."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    assert "${" not in text
    config = yaml.safe_load(text)
    validate_config(prepare_config(config))
    subnets = {s["SubnetId"] for s in client("ec2").describe_subnets()["Subnets"]}
    for node in config["available_node_types"].values():
        assert set(node["node_config"]["SubnetIds"]) <= subnets
    names = {
        p["InstanceProfileName"] for p in client("iam").list_instance_profiles()["InstanceProfiles"]
    }
    assert names == {"omnifer-head", "omnifer-worker"}
