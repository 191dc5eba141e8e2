"""Proves that Ray accepts cluster.yaml, that AWS's shapes do, and a local AWS starts its nodes.

Nothing here reaches AWS. What only a real account can show (ssh, prices, spot capacity) is untried.
"""

from __future__ import annotations

import copy
import os
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.recipe import load

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
FILLED = {
    "region": "us-east-1",
    "ami": "ami-0123456789abcdef0",
    "subnet_a": "subnet-0123456789abcdef0",
    "subnet_b": "subnet-0123456789abcdef1",
    "security_group": "sg-0123456789abcdef0",
    "head_profile": "omnifer-head",
    "worker_profile": "omnifer-worker",
}
RECIPE = ROOT / "jobs" / "recipes" / "omni-msceleb.yaml"


def filled(values: dict[str, str] = FILLED) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{(\w+)\}", lambda m: values[m[1]], TEXT))
    return found


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` reads it: defaults filled in, validated against Ray's schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    done: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(done)
    return done


def nodes(config: dict[str, Any]) -> dict[str, Any]:
    types: dict[str, Any] = config["available_node_types"]
    return types


def test_cluster__asks_for_what_its_comment_lists() -> None:
    asked = set(re.findall(r"\$\{(\w+)\}", TEXT))
    comment = TEXT.split("# The token")[0]
    assert asked == FILLED.keys()
    assert all(re.search(rf"\b{name}\b", comment) for name in asked)


def test_cluster__holds_nothing_of_an_account() -> None:
    assert not re.search(r"\b(ami|subnet|sg|vpc|i|arn|AKIA)[-:][0-9a-z]", TEXT)
    assert not re.search(r"\b\d{12}\b", TEXT)


def test_cluster__ray_accepts_it() -> None:
    config = prepared(filled())
    assert config["head_node_type"] == "head"
    assert [command for command in config["setup_commands"] if "ray-wheels" in command] == []


@pytest.mark.parametrize(
    "harm",
    [
        lambda c: c.update(idle_timeout_minuts=3),
        lambda c: nodes(c)["gpu"].update(max_worker=8),
        lambda c: nodes(c)["gpu"].pop("node_config"),
        lambda c: c.update(head_node_type="heed"),
    ],
)
def test_cluster__ray_would_not_accept_a_fault(harm: Any) -> None:
    config = filled()
    harm(config)
    with pytest.raises(
        Exception, match=r"idle_timeout_minuts|max_worker|node_config|head_node_type"
    ):
        prepared(config)


def request(node_config: dict[str, Any]) -> dict[str, Any]:
    """The request that Ray's AWS provider makes of a node_config."""
    asked = {key: value for key, value in node_config.items() if key != "SubnetIds"}
    return {**asked, "SubnetId": node_config["SubnetIds"][0], "MinCount": 1, "MaxCount": 1}


@pytest.fixture(scope="module")
def run_instances() -> Any:
    """The shape of the request, of the botocore that is installed."""
    import botocore.session

    service = botocore.session.get_session().get_service_model("ec2")
    return service.operation_model("RunInstances").input_shape


def faults(asked: dict[str, Any], shape: Any) -> str:
    from botocore.validate import ParamValidator

    return str(ParamValidator().validate(asked, shape).generate_report())


@pytest.mark.parametrize("name", ["head", "gpu", "reader"])
def test_nodes__fit_the_shape_of_run_instances(name: str, run_instances: Any) -> None:
    asked = request(nodes(filled())[name]["node_config"])
    assert faults(asked, run_instances) == ""
    enums = {
        "InstanceType": run_instances.members["InstanceType"].enum,
        "HttpTokens": run_instances.members["MetadataOptions"].members["HttpTokens"].enum,
    }
    assert asked["InstanceType"] in enums["InstanceType"]
    assert asked["MetadataOptions"]["HttpTokens"] in enums["HttpTokens"]
    assert "InstanceTyp" in faults({**asked, "InstanceTyp": "m5.large"}, run_instances)


def test_nodes__only_the_head_is_on_demand_and_workers_start_from_none() -> None:
    types = nodes(prepared(filled()))
    spot = {name for name, node in types.items() if "InstanceMarketOptions" in node["node_config"]}
    assert spot == {"gpu", "reader"}
    assert {node.get("min_workers", 0) for node in types.values()} == {0}
    assert types["head"]["resources"] == {"CPU": 0}
    profiles = {name: n["node_config"]["IamInstanceProfile"]["Name"] for name, n in types.items()}
    assert profiles == {
        "head": "omnifer-head", "gpu": "omnifer-worker", "reader": "omnifer-worker",
    }  # fmt: skip
    disks = [n["node_config"]["BlockDeviceMappings"][0]["Ebs"] for n in types.values()]
    assert all(disk["Encrypted"] for disk in disks)


def test_nodes__grow_to_what_the_recipe_says() -> None:
    from ray._private.label_utils import validate_node_labels

    types, recipe = nodes(filled()), load_cluster_recipe()
    total = {
        name: sum(node["max_workers"] * node["resources"].get(name, 0) for node in types.values())
        for name in ("CPU", "GPU")
    }
    assert (total["CPU"], total["GPU"]) == (recipe.stream.cpus, recipe.stream.gpus)
    assert (recipe.stream.node_cpus, recipe.stream.node_gpus) == (16, 1)
    assert recipe.stream.no_progress_seconds >= 3600  # a new node installs torch first
    largest = {name: max(n["resources"].get(name, 0) for n in types.values()) for name in total}
    assert recipe.embed.num_cpus <= largest["CPU"]
    assert recipe.embed.num_gpus <= largest["GPU"]
    assert recipe.embed.num_cpus <= types["gpu"]["resources"]["CPU"]
    assert recipe.embed.pool[1] == types["gpu"]["max_workers"]
    assert sum(node["max_workers"] for node in types.values()) == filled()["max_workers"]
    for node in types.values():
        validate_node_labels(node["labels"])


def load_cluster_recipe() -> Any:
    with pytest.MonkeyPatch.context() as env:
        env.setenv("OMNIFER_LABELED", "/labeled")
        env.setenv("OMNIFER_POOL", "/pool")
        return load(RECIPE)


def test_head__listens_on_loopback_and_wants_the_token() -> None:
    config = filled()
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    started = [command for command in starts if "ray start" in command]
    assert len(started) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in started)
    assert "--dashboard-host=127.0.0.1" in started[0]
    assert "~/.ray/auth_token" in config["file_mounts"]
    assert config["provider"]["use_internal_ips"] is True


def test_setup__is_pinned_and_its_files_are_there() -> None:
    config = filled()
    installs = [command for command in config["setup_commands"] if "pip install" in command]
    assert installs
    assert all("-c ~/omnifer/constraints.txt" in command for command in installs)
    assert config["head_setup_commands"] == config["worker_setup_commands"] == []
    local = [path for path in config["file_mounts"].values() if path.startswith("./")]
    assert local
    assert [path for path in local if not (ROOT / path).exists()] == []


def test_setup__runs_in_the_shell_that_ray_wraps_it_in(tmp_path: Path) -> None:
    """A tilde in quotes stays a tilde, and pip would look for a folder of that name."""
    from ray.autoscaler._private.command_runner import _with_interactive

    told = tmp_path / "told"
    for name, body in {
        "venv/bin/python": f'for word; do echo "$word" >> {told}; done',
        "omnifer/constraints.txt": "",
        ".ray/auth_token": "",
        ".bashrc": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
    (tmp_path / "venv/bin/python").chmod(0o755)
    commands = nodes_setup(filled())
    assert "ray start" in commands[-1]
    for command in commands[:-2]:  # without `ray stop` and `ray start`
        line = " ".join(_with_interactive(command))  # what ssh is given
        done = subprocess.run(
            ["sh", "-c", line],
            env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=30,
            start_new_session=True,
        )
        assert done.returncode == 0, (command, done.stderr)
    words = told.read_text().split()
    assert f"{tmp_path}/omnifer[cluster]" in words
    assert words[words.index("-c") + 1] == f"{tmp_path}/omnifer/constraints.txt"
    assert not any("~" in word for word in words)
    assert stat.S_IMODE((tmp_path / ".ray/auth_token").stat().st_mode) == 0o600
    assert "export PATH=$HOME/venv/bin:$PATH" in (tmp_path / ".bashrc").read_text()


def nodes_setup(config: dict[str, Any]) -> list[str]:
    """What `ray up` runs on a worker, in this order."""
    setup: list[str] = config["setup_commands"] + config["worker_setup_commands"]
    return setup + list(config["worker_start_ray_commands"])


@pytest.fixture
def aws(tmp_path: Path) -> Iterator[str]:
    """A local AWS API server, and a home that Ray may write keys to."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as env:
        env.setenv("HOME", str(tmp_path))
        env.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        env.setenv("AWS_ACCESS_KEY_ID", "testing")
        env.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        env.setenv("AWS_DEFAULT_REGION", FILLED["region"])
        env.delenv("AWS_PROFILE", raising=False)
        try:
            yield os.environ["AWS_ENDPOINT_URL"]
        finally:
            server.stop()


@pytest.mark.cluster
def test_bootstrap__a_local_aws_starts_every_kind_of_node(aws: str, tmp_path: Path) -> None:
    """Ray's own bootstrap and node provider; it stops where `ray up` would use ssh."""
    import boto3
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.commands import _bootstrap_config

    ec2, iam = boto3.client("ec2"), boto3.client("iam")
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    subnets = [
        ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.0.{i}.0/24", AvailabilityZone=zone)["Subnet"]
        for i, zone in enumerate(("us-east-1a", "us-east-1b"))
    ]
    group = ec2.create_security_group(GroupName="ray", Description="ray", VpcId=vpc)["GroupId"]
    ec2.authorize_security_group_ingress(
        GroupId=group,
        IpPermissions=[{"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}],
    )
    for name in ("omnifer-head", "omnifer-worker"):
        iam.create_instance_profile(InstanceProfileName=name)
    values = {
        **FILLED,
        "ami": ec2.describe_images()["Images"][0]["ImageId"],
        "subnet_a": subnets[0]["SubnetId"],
        "subnet_b": subnets[1]["SubnetId"],
        "security_group": group,
    }
    config = _bootstrap_config(filled(values), no_config_cache=True)
    assert list((tmp_path / ".ssh").glob("*.pem"))
    types = nodes(config)
    assert types["gpu"]["resources"]["GPU"] == 1

    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    started = {}
    for name, node in types.items():
        tags = {"ray-node-kind": "worker", "ray-user-node-type": name}
        (started[name],) = provider.create_node(node["node_config"], tags, 1).values()
    seen = {name: ec2_instance(ec2, node.id) for name, node in started.items()}
    assert {name: i["InstanceType"] for name, i in seen.items()} == {
        "head": "m7i.xlarge", "gpu": "g5.2xlarge", "reader": "c7i.4xlarge",
    }  # fmt: skip
    assert seen["head"]["SubnetId"] == subnets[0]["SubnetId"]
    assert {g["GroupId"] for i in seen.values() for g in i["SecurityGroups"]} == {group}
    assert seen["head"]["IamInstanceProfile"]["Arn"].endswith("/omnifer-head")
    assert seen["gpu"]["IamInstanceProfile"]["Arn"].endswith("/omnifer-worker")


def ec2_instance(ec2: Any, instance: str) -> dict[str, Any]:
    reservations = ec2.describe_instances(InstanceIds=[instance])["Reservations"]
    found: dict[str, Any] = reservations[0]["Instances"][0]
    return found
