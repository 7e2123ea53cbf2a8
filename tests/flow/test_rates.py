"""New connections in a time. The rates here give one an hour, so that what passes is exactly the burst."""

import ipaddress
from pathlib import Path

import pytest

from tests.conftest import Factory
from tests.support.certificates import REDIS, WEB, Authority, Files
from tests.support.mesh import Config, Mesh, simple
from tests.support.peers import Server, connect, echo
from tests.support.waiting import wait_until


def passed(port: int, count: int, source: str | None = None) -> int:
    return sum(passes(port, source) for _ in range(count))


def passes(port: int, source: str | None) -> bool:
    try:
        with connect(port, source=source) as client:
            client.sendall(b"x")
            return client.recv(1) == b"x"
    except ConnectionResetError:
        return False


def hourly(burst: int) -> Config:
    return {"rate": "1/h", "burst": burst}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_rate_of_a_listener_is_one_for_all_workers(mesh: Factory, workers: int) -> None:
    with Server(echo) as server:
        config = simple(server.address, listener={"limits": {"rate": hourly(20)}}) | {"workers": workers}
        m = mesh(config)
        assert passed(m.port(), 60) == 20
        m.wait_closed(limit_rate=40, downstream_closed=20)
        assert server.accepted == 20
        # What was used up stays so over a reload.
        m.reload(config | {"access_log": {"when": "never"}})
        assert passed(m.port(), 3) == 0


def test_a_rate_of_a_source_leaves_the_others_alone(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address, listener={"limits": {"rate_per_source": hourly(3)}}) | {"workers": 2})
        assert [passed(m.port(), 5, f"127.0.0.{n}") for n in range(2, 6)] == [3, 3, 3, 3]
        m.wait_closed(limit_rate=8)
        assert m.metrics()["l4mesh_rate_overflows_total"] == 0


def test_nobody_can_choose_an_address_that_has_another_s_bucket(mesh: Factory) -> None:
    """For each address there is one in any /64 that has the same hash where that is no secret."""
    prefix = ipaddress.IPv6Address("2001:db8:0:1::").packed[:8]
    victim = b"\0" * 10 + b"\xff\xff" + ipaddress.IPv4Address("192.0.2.1").packed
    there, high, low = (int.from_bytes(part, "little") for part in (prefix, victim[:8], victim[8:]))
    factor = 0x9E3779B97F4A7C15
    chosen = (mix64(there) ^ mix64(high) ^ low * factor) * pow(factor, -1, 1 << 64) % (1 << 64)
    twin = ipaddress.IPv6Address(prefix + chosen.to_bytes(8, "little"))

    def passes_for(header: str) -> bool:
        try:
            with connect(m.port()) as client:
                client.sendall(header.encode() + b"x")
                return client.recv(1) == b"x"
        except ConnectionResetError:
            return False

    with Server(echo) as server:
        listener = {"limits": {"rate_per_source": hourly(1)}, "proxy_protocol": {"from": ["127.0.0.1"]}}
        m = mesh(simple(server.address, listener=listener))
        by_twin, by_victim = f"PROXY TCP6 {twin} ::1 1 2\r\n", "PROXY TCP4 192.0.2.1 127.0.0.1 1 2\r\n"
        assert [passes_for(header) for header in (by_twin, by_twin, by_victim, by_victim)] == [True, False, True, False]


def mix64(x: int) -> int:
    """As in address.pxd."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ x >> 33) * factor % (1 << 64)
    return x ^ x >> 33


def test_who_is_over_its_own_rate_takes_nothing_of_what_is_for_all(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address, listener={"limits": {"rate_per_source": hourly(2), "rate": hourly(4)}}))
        assert passed(m.port(), 20, "127.0.0.2") == 2
        assert passed(m.port(), 20, "127.0.0.3") == 2
        assert passed(m.port(), 5, "127.0.0.4") == 0


def test_a_rate_of_the_process_is_one_for_all_listeners(mesh: Factory) -> None:
    with Server(echo) as server:
        config = simple(server.address) | {"limits": {"rate": hourly(10), "rate_per_source": hourly(6)}}
        config["listeners"].append({"name": "second", "bind": "127.0.0.1:0", "cluster": "web"})
        m = mesh(config)
        assert passed(m.port(), 4, "127.0.0.2") + passed(m.port("second"), 10, "127.0.0.2") == 6
        assert passed(m.port(), 10, "127.0.0.3") == 4


def test_a_rate_of_a_workload_is_one_for_its_addresses(mesh: Factory) -> None:
    with Server(echo) as server:
        config = simple(server.address, listener={"limits": {"rate_per_workload": hourly(4)}})
        config["workloads"] = [
            {"name": "a", "addresses": ["127.0.0.2", "127.0.0.3"]},
            {"name": "b", "addresses": ["127.0.0.4"]},
        ]
        m = mesh(config)
        assert passed(m.port(), 3, "127.0.0.2") + passed(m.port(), 5, "127.0.0.3") == 4
        assert passed(m.port(), 6, "127.0.0.4") == 4
        assert passed(m.port(), 6, "127.0.0.5") == 6, "it is no workload"


def test_a_rate_of_an_identity_is_asked_after_the_handshake_and_before_the_dial(
    mesh: Factory, ca: Authority, web: Files, redis: Files, tmp_path: Path
) -> None:
    with Server(echo) as server:
        other = ca.files(tmp_path, "other", WEB.replace("web", "other"))
        inner = simple(
            server.address, listener={"limits": {"rate_per_identity": hourly(3)}, "tls": {"mode": "strict", "identity": "redis"}}
        )
        inner["identities"] = [redis.identity("redis")]
        inside = mesh(inner)
        outer: list[Mesh] = []
        for files in (web, other):
            config = simple(f"127.0.0.1:{inside.port()}", tls={"peers": [REDIS], "identity": "own"}, connect={"attempts": 1})
            config["identities"] = [files.identity("own")]
            outer.append(mesh(config))
        assert [passed(m.port(), 7) for m in outer] == [3, 3]
        inside.wait_closed(limit_rate=8)
        assert server.accepted == 6
        refused = wait_until(lambda: r if len(r := inside.records()) == 8 else None, "all refusals are logged")
        assert {record["reason"] for record in refused} == {"limit_rate"}
        assert {record["downstream_identity"] for record in refused} == {WEB, WEB.replace("web", "other")}
