"""The examples for systemd and Kubernetes say of l4mesh what is true."""

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from l4mesh.capture.rules import build_rules
from l4mesh.cli import cli
from l4mesh.config.load import load_config, parse_config
from l4mesh.model import Config

CONF = Path(__file__).parents[3] / "conf"


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    return {one["kind"]: one for one in yaml.safe_load_all((CONF / "daemonset.yaml").read_text())}


@pytest.fixture(scope="module")
def pod(objects: dict[str, Any]) -> Any:
    return objects["DaemonSet"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def config(objects: dict[str, Any]) -> Config:
    (text,) = objects["ConfigMap"]["data"].values()
    return parse_config(text)


def run_options(words: list[str]) -> dict[str, Any]:
    """What `l4mesh run` makes of its arguments."""
    command = cli.commands[words[0]]
    return command.make_context(words[0], words[1:]).params


def test_the_unit_runs_supervised_and_says_when_it_is_ready() -> None:
    unit = dict(line.split("=", 1) for line in (CONF / "l4mesh.service").read_text().splitlines() if "=" in line and line[0] != "#")
    assert run_options(unit["ExecStart"].split("/l4mesh ")[1].split())["manage_redirect"]
    assert (unit["Type"], unit["KillMode"]) == ("notify", "mixed")
    assert {"CAP_NET_ADMIN", "CAP_NET_RAW"} <= set(unit["CapabilityBoundingSet"].split())
    drain = load_config([CONF / "minimal.yaml"]).drain
    assert int(unit["TimeoutStopSec"].removesuffix("s")) * 1000 > drain.time_ms + drain.over_ms


@pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
def test_kubernetes_takes_the_objects(objects: dict[str, Any], version: str) -> None:
    for one in objects.values():
        kubernetes_validate.validate(one, version, strict=True)


def test_the_configuration_in_the_map_captures(config: Config) -> None:
    assert [family.is_v6 for family in build_rules(config)] == [False, True]


def test_what_is_mounted_is_what_the_command_reads(objects: dict[str, Any], pod: Any) -> None:
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert all(name.endswith(".yaml") for name in objects["ConfigMap"]["data"])
    volume = next(volume for volume in pod["volumes"] if volume["name"] == "config")
    assert volume["configMap"]["name"] == objects["ConfigMap"]["metadata"]["name"]
    assert container["command"][0] == "l4mesh"
    options = run_options(container["command"][1:])
    assert [str(path) for path in options["paths"]] == [mounts["config"]]
    assert options["manage_redirect"]


def test_probes_ask_the_admin_server_of_the_configuration(config: Config, pod: Any) -> None:
    (container,) = pod["containers"]
    for kind, path in (("readinessProbe", "/ready"), ("livenessProbe", "/live")):
        probe = container[kind]["httpGet"]
        assert f"{probe['host']}:{probe['port']}" == config.admin
        assert probe["path"] == path


def test_the_next_pod_finds_this_one(objects: dict[str, Any], config: Config, pod: Any) -> None:
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    of_the_host = {volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume}
    assert str(Path(config.upgrade_socket).parent) in of_the_host & {*mounts.values()}


def test_a_surge_has_room_and_a_drain_has_time(objects: dict[str, Any], config: Config, pod: Any) -> None:
    rolling = objects["DaemonSet"]["spec"]["updateStrategy"]["rollingUpdate"]
    assert (rolling["maxSurge"], rolling["maxUnavailable"]) == (1, 0)
    assert pod["hostNetwork"]
    assert "ports" not in pod["containers"][0]
    assert pod["terminationGracePeriodSeconds"] * 1000 > config.drain.time_ms + config.drain.over_ms
    labels = objects["DaemonSet"]["spec"]["template"]["metadata"]["labels"]
    assert objects["DaemonSet"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert pod["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"]}
