"""What drives outlier detection, with counters and a clock set by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from l4mesh.config.load import parse_config
from l4mesh.model import Config, Endpoint
from l4mesh.policy.outlier import Counts, Past
from l4mesh.runtime.endpoints import EndpointRegistry, OutCause
from l4mesh.runtime.outlier import OutlierDetector, can_connect
from tests.support.peers import Server, closed_port, echo


def config_of(clusters: int = 1, outlier: str = "{interval: 10s, base_ejection: 30s}", endpoints: int = 4) -> Config:
    rows = [
        f"  - {{name: c{i}, endpoints: [{', '.join(f'10.0.{i}.{j}:80' for j in range(1, endpoints + 1))}], outlier_detection: {outlier}}}"
        for i in range(clusters)
    ]
    return parse_config('listeners: [{name: a, bind: "127.0.0.1:1", cluster: c0}]\nclusters:\n' + "\n".join(rows) + "\n")


class Bench:
    """The data path as the detector sees it."""

    def __init__(self, config: Config, pasts: Mapping[str, Sequence[Past]] | None = None) -> None:
        self.config = config
        self.now_ms = 1000
        self.counts: dict[tuple[str, str], Counts] = {}
        self.out: dict[tuple[str, str], int] = {}
        self.warmed: list[str] = []
        self.forgotten: list[str] = []
        self.looked: list[str] = []
        self.answers: list[bool] = []
        self.registry = EndpointRegistry(self)
        draws = iter(range(10**6))
        self.detector = OutlierDetector(self, self.registry, lambda: next(draws) % 10 / 10, self.probe, lambda: self.now_ms)
        self.detector.inherit(pasts or {})
        self.configure(config)

    def configure(self, config: Config) -> None:
        self.config = config
        self.registry.configure(config)
        self.detector.configure(config)

    async def probe(self, endpoint: Endpoint, within_ms: int, mark: int) -> bool:
        assert (within_ms, mark) == (1000, 0)
        return self.answers.pop(0)

    def addresses(self, cluster: str) -> list[str]:
        return [endpoint.address for endpoint in self.config.clusters[cluster].endpoints]

    def outlier_counts(self, cluster: str) -> dict[str, Counts]:
        self.looked.append(cluster)
        return {address: self.counts.get((cluster, address), Counts()) for address in self.addresses(cluster)}

    def outlier_count(self, cluster: str, address: str) -> Counts | None:
        return self.counts.get((cluster, address), Counts()) if address in self.addresses(cluster) else None

    def endpoint_ids(self, cluster: str) -> dict[int, str]:
        return {hash((cluster, address)): address for address in self.addresses(cluster)}

    def forget_failures(self, cluster: str, address: str) -> None:
        self.forgotten.append(address)
        self.counts.pop((cluster, address), None)

    def set_endpoint_out(self, cluster: str, address: str, causes: int) -> bool:
        self.out[cluster, address] = causes
        return True

    def warm_endpoint(self, cluster: str, address: str, over_ms: int) -> None:
        self.warmed.append(address)

    def set_panic(self, cluster: str, panic: bool) -> None: ...

    def fail(self, address: str, cluster: str = "c0", times: int = 5) -> None:
        self.counts[cluster, address] = Counts(times, times, 0, 0, times, 0)
        self.detector.told([hash((cluster, address))])

    @property
    def ejected(self) -> frozenset[str]:
        return self.registry.marked("c0", OutCause.EJECTED)


def test_told_of_an_endpoint_it_ejects_it_and_lets_it_return_in_time() -> None:
    bench = Bench(config_of())
    bench.fail("10.0.0.1:80", times=4)
    assert bench.ejected == frozenset()
    bench.fail("10.0.0.1:80")
    assert bench.ejected == {"10.0.0.1:80"}
    assert bench.out["c0", "10.0.0.1:80"] == OutCause.EJECTED
    assert bench.detector.totals() == [("c0", "consecutive_failures", "ejected", 1)]
    view = bench.detector.view("c0", "10.0.0.1:80")
    assert view
    assert (view.times, view.detector) == (1, "consecutive_failures")
    bench.now_ms += round((view.until_unix_s - view.since_unix_s) * 1000) - 1
    bench.detector.look()
    assert bench.ejected == {"10.0.0.1:80"}
    bench.now_ms += 1
    bench.detector.look()
    assert bench.ejected == frozenset()
    assert (bench.warmed, bench.forgotten) == (["10.0.0.1:80"], ["10.0.0.1:80"])


def test_who_is_unknown_or_gone_is_ignored() -> None:
    bench = Bench(config_of())
    bench.detector.told([1, 2, 3])
    bench.fail("10.0.0.4:80")
    assert bench.ejected == {"10.0.0.4:80"}
    bench.configure(config_of(endpoints=3))
    assert bench.ejected == frozenset()
    bench.detector.told([hash(("c0", "10.0.0.4:80"))])
    bench.now_ms += 1_000_000
    bench.detector.look()
    assert bench.detector.view("c9", "10.0.0.1:80") is None


def test_a_probe_decides_about_the_return() -> None:
    async def run() -> None:
        bench = Bench(config_of(outlier="{interval: 1s, base_ejection: 1s, probe: on}"))
        bench.fail("10.0.0.1:80")
        bench.answers = [False, True]
        for expected in ({"10.0.0.1:80"}, set()):
            bench.now_ms += 1000
            bench.detector.look()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert bench.ejected == expected
        assert bench.answers == []

    asyncio.run(run())


def test_a_probe_of_what_is_gone_meanwhile_is_nobody_s() -> None:
    async def run() -> None:
        bench = Bench(config_of(outlier="{interval: 1s, base_ejection: 1s, probe: on}"))
        bench.fail("10.0.0.1:80")
        bench.answers = [True]
        bench.now_ms += 1000
        bench.detector.look()
        bench.configure(replace(bench.config, clusters={}))
        [probe] = asyncio.all_tasks() - {asyncio.current_task()}
        await probe
        assert bench.answers == []

    asyncio.run(run())


def test_another_process_goes_on_with_what_this_one_knows() -> None:
    old = Bench(config_of(2))
    old.fail("10.0.0.1:80")
    old.fail("10.0.0.2:80")
    old.now_ms += 40_000
    old.detector.look()
    old.fail("10.0.0.1:80")
    assert old.ejected == {"10.0.0.1:80"}
    old.now_ms += 7_000
    told = old.detector.view("c0", "10.0.0.1:80")
    assert told

    new = Bench(config_of(2), old.detector.past() | {"gone": [Past("10.0.9.9:80", 1, 1)]})
    assert new.ejected == {"10.0.0.1:80"}
    (out,) = new.registry.out("c0", "10.0.0.1:80")
    view = new.detector.view("c0", "10.0.0.1:80")
    assert view
    assert (view.times, view.detector, out.why) == (2, "consecutive_failures", "dials that failed in a row: 5")
    assert out.since_unix_s == pytest.approx(view.since_unix_s, abs=1)
    left_ms = round((view.until_unix_s - view.since_unix_s) * 1000) - 7_000
    # What has returned is reckoned with as well.
    assert Past("10.0.0.2:80", 1, 1) in new.detector.past()["c0"]
    assert left_ms == round((told.until_unix_s - told.since_unix_s) * 1000) - 7_000
    new.now_ms += left_ms - 1
    new.detector.look()
    assert new.ejected == {"10.0.0.1:80"}
    new.now_ms += 1
    new.detector.look()
    assert new.ejected == frozenset()


def test_what_another_process_knew_is_bounded_by_the_configuration_of_this_one() -> None:
    past = Past("10.0.0.1:80", 1, 1, "consecutive_failures", "", 0, 3_600_000)
    bench = Bench(
        config_of(outlier="{max_ejection: 60s}"), {"c0": [past, Past("10.0.0.2:80", 1, 1, "of another version", "", 0, 1000)]}
    )
    view = bench.detector.view("c0", "10.0.0.1:80")
    assert view
    assert view.until_unix_s - view.since_unix_s == pytest.approx(60)
    assert bench.ejected == {"10.0.0.1:80"}
    assert Bench(config_of(outlier="off"), {"c0": [past]}).ejected == frozenset()


def test_many_clusters_are_not_looked_at_together() -> None:
    bench = Bench(config_of(clusters=10))
    bench.looked.clear()
    seen = []
    for _ in range(10):
        bench.now_ms += 1000
        bench.detector.look()
        seen.append(len(bench.looked))
        bench.looked.clear()
    assert sum(seen) >= 10
    assert max(seen) <= 2
    # A reload that changes one of them looks at one.
    text = config_of(clusters=10)
    clusters = dict(bench.config.clusters) | {"c3": text.clusters["c3"]}
    bench.configure(replace(bench.config, clusters=clusters))
    assert bench.looked == ["c3"]


def test_what_enforce_left_out_is_ejected_when_it_no_longer_does() -> None:
    bench = Bench(config_of(outlier="{enforce: 0%}"))
    bench.fail("10.0.0.1:80")
    assert bench.ejected == frozenset()
    bench.configure(config_of(outlier="{enforce: 100%}"))
    bench.now_ms += 10_000
    bench.detector.look()
    assert bench.ejected == {"10.0.0.1:80"}


@pytest.mark.parametrize("there", [True, False])
def test_a_probe_connects_for_real(there: bool) -> None:
    async def run() -> None:
        with Server(echo) as server:
            port = server.port if there else closed_port()
            assert await can_connect(Endpoint("127.0.0.1", port), 5000, 0) is there

    asyncio.run(run())


@pytest.mark.parametrize("turns", range(6))
def test_it_ends_when_told_to_whatever_has_just_woken_it(turns: int) -> None:
    async def run() -> None:
        bench = Bench(config_of(outlier="{interval: 1h}"))
        task = asyncio.create_task(bench.detector.run())
        for _ in range(5):
            await asyncio.sleep(0)
        bench.configure(config_of(outlier="{interval: 1s}"))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=5)
        assert task.cancelled()

    asyncio.run(run())
