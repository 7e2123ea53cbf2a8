"""The registry of endpoints that are out, and when a cluster panics."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from l4mesh.config import schema
from l4mesh.config.load import load_config
from l4mesh.errors import CloseReason
from l4mesh.model import Cluster, Config
from l4mesh.runtime.endpoints import EndpointRegistry, OutCause


class Recorded:
    """Keeps what the workers would see."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.out: dict[str, int] = {}
        self.warmed: dict[str, int] = {}
        self.leaving: dict[str, tuple[CloseReason, int]] = {}
        self.panic = False

    def set_endpoint_out(self, cluster: str, address: str, causes: int) -> bool:
        if address not in [endpoint.address for endpoint in self.config.clusters[cluster].endpoints]:
            return False
        self.out[address] = causes
        return True

    def warm_endpoint(self, cluster: str, address: str, over_ms: int) -> None:
        self.warmed[address] = over_ms

    def close_endpoint(self, cluster: str, address: str, reason: CloseReason, over_ms: int) -> None:
        self.leaving[address] = (reason, over_ms)

    def keep_endpoint(self, cluster: str, address: str) -> None:
        self.leaving.pop(address, None)

    def set_panic(self, cluster: str, panic: bool) -> None:
        self.panic = panic


def make_config(cluster: Cluster, tmp: Config) -> Config:
    return replace(tmp, clusters={cluster.name: cluster})


def make_registry(tmp_path: Path, n: int = 4, **keys: object) -> tuple[EndpointRegistry, Recorded, list[str]]:
    path = tmp_path / "c.yaml"
    path.write_text('listeners: [{name: a, bind: "127.0.0.1:1", cluster: web}]\nclusters: [{name: web, endpoints: ["127.0.0.1:2"]}]\n')
    section = schema.ClusterSection.model_validate({"name": "web", "endpoints": [f"10.0.0.{i}:80" for i in range(1, n + 1)], **keys})
    config = make_config(schema.make_cluster(section), load_config([path]))
    marks = Recorded(config)
    registry = EndpointRegistry(marks)
    registry.configure(config)
    return registry, marks, [endpoint.address for endpoint in config.clusters["web"].endpoints]


def test_an_endpoint_serves_again_when_every_cause_is_gone(tmp_path: Path) -> None:
    registry, marks, (first, *_) = make_registry(tmp_path, slow_start="30s")
    assert registry.take_out("web", first, OutCause.EJECTED, "5 failures in a row")
    assert registry.take_out("web", first, OutCause.UNHEALTHY, "connect: refused")
    assert marks.out[first] == 3
    assert [out.cause.label for out in registry.out("web", first)] == ["ejected", "unhealthy"]
    assert registry.put_back("web", first, OutCause.UNHEALTHY)
    assert marks.out[first] == 1
    assert not marks.warmed
    assert registry.put_back("web", first, OutCause.EJECTED)
    assert marks.out[first] == 0
    assert marks.warmed == {first: 30_000}
    assert registry.out("web", first) == ()
    assert not registry.put_back("web", first, OutCause.EJECTED)


def test_connections_of_an_unhealthy_endpoint_end_when_asked(tmp_path: Path) -> None:
    registry, marks, (first, second, *_) = make_registry(tmp_path, drain={"unhealthy": "30s"})
    registry.take_out("web", second, OutCause.EJECTED, "5 failures in a row")
    assert not marks.leaving
    registry.take_out("web", first, OutCause.UNHEALTHY, "connect: refused")
    assert marks.leaving == {first: (CloseReason.ENDPOINT_UNHEALTHY, 30_000)}
    registry.put_back("web", first, OutCause.UNHEALTHY)
    assert not marks.leaving


def test_a_reload_that_changes_how_unhealthy_endpoints_drain_is_for_those_that_are_so(tmp_path: Path) -> None:
    registry, marks, (first, second, *_) = make_registry(tmp_path)
    registry.take_out("web", first, OutCause.UNHEALTHY, "connect: refused")
    registry.take_out("web", second, OutCause.EJECTED, "5 failures in a row")
    cluster = marks.config.clusters["web"]
    for over_ms in (500, 2000, 0):
        registry.configure(make_config(replace(cluster, drain=replace(cluster.drain, unhealthy_ms=over_ms)), marks.config))
        assert marks.leaving == ({first: (CloseReason.ENDPOINT_UNHEALTHY, over_ms)} if over_ms else {})


def test_since_is_the_first_time(tmp_path: Path) -> None:
    registry, _, (first, *_) = make_registry(tmp_path)
    registry.take_out("web", first, OutCause.UNHEALTHY, "timeout")
    (before,) = registry.out("web", first)
    registry.take_out("web", first, OutCause.UNHEALTHY, "connect: refused")
    (after,) = registry.out("web", first)
    assert (after.since_unix_s, after.why) == (before.since_unix_s, "connect: refused")


def test_panic_begins_below_the_threshold_and_ends_at_it(tmp_path: Path) -> None:
    registry, marks, addresses = make_registry(tmp_path)
    for address in addresses[:2]:
        registry.take_out("web", address, OutCause.UNHEALTHY, "connect: refused")
    assert not marks.panic
    assert registry.serving("web") == 2
    registry.take_out("web", addresses[2], OutCause.UNHEALTHY, "connect: refused")
    assert marks.panic
    assert [(s.endpoints, s.unhealthy, s.panic) for s in registry.states()] == [(4, 3, True)]
    registry.put_back("web", addresses[0], OutCause.UNHEALTHY)
    assert not marks.panic


def test_without_a_threshold_there_is_no_panic(tmp_path: Path) -> None:
    registry, marks, addresses = make_registry(tmp_path, n=2, panic_threshold="off")
    for address in addresses:
        registry.take_out("web", address, OutCause.EJECTED, "5 failures in a row")
    assert not marks.panic


def test_a_reload_forgets_endpoints_that_are_gone_and_judges_anew(tmp_path: Path) -> None:
    registry, marks, addresses = make_registry(tmp_path)
    for address in addresses[:3]:
        registry.take_out("web", address, OutCause.UNHEALTHY, "connect: refused")
    assert marks.panic
    cluster = marks.config.clusters["web"]
    marks.config = make_config(replace(cluster, endpoints=cluster.endpoints[2:]), marks.config)
    registry.configure(marks.config)
    assert not marks.panic
    assert registry.out("web", addresses[0]) == ()
    assert registry.out("web", addresses[2])
    assert not registry.take_out("web", addresses[0], OutCause.UNHEALTHY, "connect: refused")
    marks.config = replace(marks.config, clusters={})
    registry.configure(marks.config)
    assert registry.states() == []


def test_what_serves_is_counted_right_whatever_happens(tmp_path: Path) -> None:
    registry, marks, addresses = make_registry(tmp_path, n=8)
    chance = random.Random(7)
    whole = marks.config.clusters["web"]
    for _ in range(2000):
        address = chance.choice(addresses)
        cause = chance.choice(list(OutCause))
        if chance.random() < 0.1:
            some = tuple(replace(one, weight=chance.choice((0, 1))) for one in whole.endpoints if chance.random() < 0.8)
            marks.config = make_config(replace(whole, endpoints=some), marks.config)
            registry.configure(marks.config)
        elif chance.random() < 0.5:
            registry.take_out("web", address, cause, "x")
        else:
            registry.put_back("web", address, cause)
        weighted = [one.address for one in marks.config.clusters["web"].endpoints if one.weight]
        serving = sum(1 for one in weighted if not registry.out("web", one))
        assert registry.serving("web") == serving
        assert marks.panic == registry.is_panicking("web") == (serving < 0.5 * len(weighted))
