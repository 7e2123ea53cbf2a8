"""Counters that go on in the next process."""

import json
from dataclasses import replace
from typing import Any, get_type_hints

import pytest

from l4mesh.errors import CloseReason, Fault, TlsCause
from l4mesh.snapshot import ClusterSnapshot, EndpointSnapshot, ListenerSnapshot, Snapshot, TlsSnapshot, WorkerSnapshot
from l4mesh.totals import Count, Totals

CLOSED = {CloseReason.DOWNSTREAM_CLOSED: 3}
CLUSTER = ClusterSnapshot("c", 1, 4, CLOSED, 10, 20, 5, 1, 0.5, (1,) * 17, (2,) * len(Fault))
LISTENER = ListenerSnapshot("l", 1, 4, CLOSED)
WORKERS = (WorkerSnapshot(0, 1, 3, 0, False, 0, 4, 100, 10, 20, 0, 1, 1), WorkerSnapshot(1, 0, 1, 0, True, 2, 4, 100, 10, 20, 0, 1, 1))
TLS = TlsSnapshot({("downstream", True): 2}, {("upstream", TlsCause.EXPIRED): 1}, 7)
ENDPOINT = EndpointSnapshot("c", "10.0.0.1:80", 5, "z", 1, 4, 1, 10, 20, False, {"no_answer": 2})
SNAPSHOT = Snapshot(
    9,
    WORKERS,
    (LISTENER,),
    (CLUSTER,),
    replace(CLUSTER, name="(removed)"),
    replace(LISTENER, name="(removed)"),
    1,
    TLS,
    1000,
    False,
    0,
    0,
)


def crossed(totals: Totals) -> Totals:
    return Totals.decode(json.loads(json.dumps(totals.encode())))


def test_what_is_counted_crosses() -> None:
    totals = crossed(Totals.of(SNAPSHOT, [ENDPOINT]))
    assert totals.clusters == (CLUSTER,)
    assert totals.listeners == (LISTENER,)
    assert totals.tls == TLS
    assert totals.endpoints == (replace(ENDPOINT, weight=0, zone=""),)
    assert [(worker.worker, worker.accepted, worker.pipes, worker.paused) for worker in totals.workers] == [
        (0, 3, 0, False),
        (1, 1, 0, False),
    ]


def test_very_many_cost_no_more_each_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 50,000 endpoints an upgrade waits for this, and not longer than ten seconds."""
    read: list[type] = []

    def read_hints(kind: type) -> dict[str, Any]:
        read.append(kind)
        return get_type_hints(kind)

    monkeypatch.setattr("l4mesh.totals.get_type_hints", read_hints)
    endpoints = [replace(ENDPOINT, address=f"10.0.0.1:{port}") for port in range(1, 1000)]
    assert len(crossed(Totals.of(SNAPSHOT, endpoints)).endpoints) == 999
    assert len(read) < 20


def test_connections_that_were_handed_over_have_not_ended() -> None:
    closed = CLOSED | {CloseReason.HANDED_OVER: 5}
    snapshot = replace(SNAPSHOT, clusters=(replace(CLUSTER, closed=closed),), listeners=(replace(LISTENER, closed=closed),))
    totals = crossed(Totals.of(snapshot, []))
    assert totals.clusters[0].closed == totals.listeners[0].closed == CLOSED


def test_they_add_up_by_name_and_the_rest_is_removed() -> None:
    before = crossed(Totals.of(replace(SNAPSHOT, clusters=(CLUSTER, replace(CLUSTER, name="gone"))), []))
    after = before.add_to(SNAPSHOT, gone_clusters=["gone"], gone_listeners=["l"])
    assert [(cluster.name, cluster.opened, cluster.closed) for cluster in after.clusters] == [
        ("c", 8, {CloseReason.DOWNSTREAM_CLOSED: 6})
    ]
    assert after.clusters[0].connect_seconds_buckets == (2,) * 17
    assert after.retired.opened == 12
    assert after.listeners == (LISTENER,)
    assert after.retired_listeners.opened == 12
    assert [worker.accepted for worker in after.workers] == [6, 2]
    assert [worker.pipes for worker in after.workers] == [4, 4]
    assert after.tls.handshakes == {("downstream", True): 4}
    assert (after.generation, after.max_connections) == (9, 1000)


def test_a_worker_that_is_no_more_still_counts() -> None:
    after = Totals.of(SNAPSHOT, []).add_to(replace(SNAPSHOT, workers=WORKERS[:1]), [], [])
    assert [worker.accepted for worker in after.workers] == [3 + 3 + 1]


def test_at_rest_nothing_is_live() -> None:
    totals = Totals.of(SNAPSHOT, [ENDPOINT]).at_rest()
    assert totals.add_to(SNAPSHOT, [], []).clusters[0].active == CLUSTER.active
    assert totals.endpoints[0].active == 0
    assert totals.endpoints[0].opened == 4


def test_another_version_may_count_more_or_less() -> None:
    data = json.loads(json.dumps(Totals.of(SNAPSHOT, []).encode()))
    data["clusters"][0]["closed"].append(["A_REASON_TO_COME", 4])
    data["clusters"][0]["mirrored"] = 4
    data["tls"]["failures"].append([["upstream", "A_CAUSE_TO_COME"], 4])
    data["more"] = {}
    del data["workers"][0]["holds"]
    totals = Totals.decode(data)
    assert totals.clusters == (CLUSTER,)
    assert totals.tls == TLS


@pytest.mark.parametrize(
    "data",
    [
        None, [], 3, {"workers": 3}, {"workers": [3]}, {"workers": [{"worker": "x"}]}, {"clusters": [{"closed": [3]}]},
        {"clusters": [{"closed": [["DENIED", "many"]]}]}, {"tls": []}, {"listeners": [{"name": 1}]}, {"workers": [{"accepted": True}]},
        {"tls": {"handshakes": [["downstream", 1]]}},
    ],
    ids=str,
)  # fmt: skip
def test_anything_else_is_refused(data: object) -> None:
    with pytest.raises(ValueError, match="not the counters of a process|unpack|zip"):
        Totals.decode(data)


def test_a_count_of_the_control_loop_crosses() -> None:
    count = Count("l4mesh_health_check", {"cluster": "c", "result": "passed"}, 3)
    assert Count.decode(json.loads(json.dumps(count.encode()))) == count


@pytest.mark.parametrize(
    "data", [None, 1, [], ["m", [], 1, 1], [1, [], 1], ["m", 1, 1], ["m", [["a"]], 1], ["m", [[1, 2]], 1], ["m", [], "1"]]
)
def test_what_is_no_count_is_refused(data: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        Count.decode(data)
