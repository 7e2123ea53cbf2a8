"""Balancing, seen from outside: which endpoint got how many."""

from collections import Counter
from contextlib import ExitStack

import pytest

from tests.conftest import Factory
from tests.support.mesh import simple
from tests.support.peers import Server, connect, echo, is_refused, read_to_end, talk
from tests.support.proxies import free_port


def ask(port: int, source: str | None = None) -> str:
    with connect(port, source=source) as client:
        return read_to_end(client)[0].decode()


def servers(stack: ExitStack, count: int) -> list[Server]:
    made: list[Server] = []
    for index in range(count):
        made.append(stack.enter_context(Server(lambda peer, index=index: peer.sendall(b"%d" % index))))  # type: ignore[misc]
    return made


@pytest.mark.parametrize("balance", ["round_robin", "random", "least_connections"])
def test_every_endpoint_gets_its_share(mesh: Factory, balance: str) -> None:
    with ExitStack() as stack:
        a, b, c = servers(stack, 3)
        endpoints = [a.address, {"address": b.address, "weight": 2}, {"address": c.address, "weight": 0}]
        config = simple(balance=balance) | {"workers": 1}
        config["clusters"][0]["endpoints"] = endpoints
        m = mesh(config)
        counts = Counter(ask(m.port()) for _ in range(300))
        assert counts["2"] == 0
        if balance == "round_robin":
            assert (counts["0"], counts["1"]) == (100, 200)
        else:
            assert 60 <= counts["0"] <= 140


@pytest.mark.parametrize("balance", ["source_hash", "maglev"])
def test_a_source_stays_with_its_endpoint(mesh: Factory, balance: str) -> None:
    with ExitStack() as stack:
        config = simple(*(server.address for server in servers(stack, 4)), balance=balance)
        m = mesh(config)
        port = m.port()
        home = {source: ask(port, source) for source in (f"127.0.0.{n}" for n in range(2, 60))}
        assert len(set(home.values())) == 4
        assert all(ask(port, source) == endpoint for source, endpoint in home.items())


@pytest.mark.parametrize("balance", ["source_hash", "maglev"])
def test_a_bound_on_the_load_is_kept_from_the_first_connection_on(mesh: Factory, balance: str) -> None:
    with Server(echo) as one, Server(echo) as other, ExitStack() as stack:
        m = mesh(simple(one.address, other.address, balance=balance, bounded_load="100%"))
        for count in range(1, 7):
            talk(stack.enter_context(connect(m.port())))
            assert max(one.accepted, other.accepted) == (count + 1) // 2


def test_connections_go_to_the_own_zone_and_spill_over_when_it_is_full(mesh: Factory) -> None:
    with ExitStack() as stack:
        near, far = servers(stack, 2)
        config = simple(limits={"connections_per_endpoint": 2}) | {"node": {"name": "n", "zone": "z1"}}
        config["clusters"][0]["endpoints"] = [{"address": near.address, "zone": "z1"}, {"address": far.address, "zone": "z2"}]
        m = mesh(config)
        port = m.port()
        assert {ask(port) for _ in range(20)} == {"0"}
    with ExitStack() as stack:
        held = stack.enter_context(Server(lambda peer: read_to_end(peer)))
        spill = stack.enter_context(Server(lambda peer: peer.sendall(b"spill")))
        config["clusters"][0]["endpoints"] = [{"address": held.address, "zone": "z1"}, {"address": spill.address, "zone": "z2"}]
        m = mesh(config)
        port = m.port()
        clients = [connect(port) for _ in range(2)]
        while m.cluster()["endpoints"][0]["active"] < 2:
            pass
        assert ask(port) == "spill"
        for client in clients:
            client.close()


def test_routes_by_destination_port_source_and_split(mesh: Factory) -> None:
    with ExitStack() as stack:
        a, b, c = servers(stack, 3)
        config = {
            "listeners": [
                {
                    "name": "web",
                    "bind": "0.0.0.0:0",
                    "routes": [
                        {"match": {"destinations": ["127.0.0.7"]}, "cluster": "a"},
                        {"match": {"sources": ["127.0.0.8/31"]}, "cluster": "b"},
                        {
                            "match": {"destinations": ["127.0.1.0/24"]},
                            "split": [{"cluster": "a", "weight": 1}, {"cluster": "c", "weight": 3}],
                        },
                    ],
                    "default": "reject",
                }
            ],
            "clusters": [{"name": name, "endpoints": [server.address]} for name, server in zip("abc", (a, b, c), strict=True)],
        }
        m = mesh(config)
        port = m.port()

        def to(host: str, source: str | None = None) -> str:
            with connect(port, host, source) as client:
                return read_to_end(client)[0].decode()

        assert to("127.0.0.7", "127.0.0.8") == "0"
        assert to("127.0.0.1", "127.0.0.9") == "1"
        counts = Counter(to("127.0.1.9", "127.0.0.20") for _ in range(200))
        assert 25 <= counts["0"] <= 80
        assert counts["0"] + counts["2"] == 200
        assert is_refused(port, "127.0.0.1", "127.0.0.20")
        m.wait_closed(no_route=1)


@pytest.mark.parametrize("balance", ["round_robin", "least_connections"])
def test_dead_endpoints_fail_nobody_once_each_was_met(mesh: Factory, balance: str) -> None:
    """Three attempts and six dead endpoints, without ejection: who meets three that nobody had met fails, and that is twice at most."""
    with ExitStack() as stack:
        live = servers(stack, 2)
        dead = [f"127.0.0.1:{free_port()}" for _ in range(6)]
        m = mesh(simple(*dead, *(server.address for server in live), balance=balance))
        port = m.port()
        failed = [is_refused(port) for _ in range(100)]
        assert sum(failed) <= 2
        assert not any(failed[-50:])
