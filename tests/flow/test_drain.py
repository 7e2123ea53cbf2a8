"""The gradual closer: the end of the process, endpoints that go, and endpoints that join."""

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
from pathlib import Path

import yaml

from l4mesh.config.load import parse_config
from l4mesh.datapath import Datapath
from l4mesh.errors import CloseReason
from l4mesh.runtime.listeners import Listeners
from tests.conftest import Factory
from tests.support.mesh import Config, simple
from tests.support.peers import RST, Server, connect, echo, is_refused, read_to_end, talk
from tests.support.proxies import free_port
from tests.support.tracer import Tracer, worker_thread
from tests.support.waiting import wait_until


def refuses(port: int) -> bool:
    try:
        return is_refused(port)
    except ConnectionRefusedError:
        return True


def said(events: list[dict[str, object]], name: str) -> bool:
    return any(event["event"] == name for event in events)


def test_sigterm_refuses_new_connections_and_waits_for_those_that_are_there(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address) | {"drain": {"time": "1h", "over": "off"}})
        port = m.port()
        with connect(port) as client:
            talk(client)
            m.process.send_signal(signal.SIGTERM)
            wait_until(lambda: said(m.events(), "draining"), "it drains")
            assert m.fetch("/ready")[0] == 503
            assert m.fetch("/live")[0] == 200
            assert refuses(port)
            talk(client)
            client.shutdown(socket.SHUT_WR)
            assert read_to_end(client) == (b"", "FIN")
        assert m.process.wait(15) == 0
        assert next(event for event in m.events() if event["event"] == "drained")["connections_cut"] == 0


def test_the_command_waits_for_the_end(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address) | {"drain": {"time": "1h", "over": "off"}})
        with connect(m.port()) as client:
            talk(client)
            command = [sys.executable, "-m", "l4mesh", "drain", "--admin", m.admin]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as drain:
                assert drain.stdout
                assert drain.stdout.readline() == f"process {m.process.pid} drains\n"
                talk(client)
                client.close()
                assert m.process.wait(15) == 0
                assert drain.stdout.read() == "it has ended\n"
            assert drain.returncode == 0


def test_what_waits_in_the_accept_queue_is_served(mesh: Factory) -> None:
    with Server(echo) as server, contextlib.ExitStack() as stack:
        m = mesh(simple(server.address) | {"drain": {"time": "1h", "over": "off"}})
        port = m.port()
        m.process.send_signal(signal.SIGSTOP)
        clients = [stack.enter_context(connect(port)) for _ in range(50)]
        m.process.send_signal(signal.SIGTERM)
        m.process.send_signal(signal.SIGCONT)
        for client in clients:
            talk(client)
        wait_until(lambda: said(m.events(), "draining"), "it drains")
        assert refuses(port)
        assert m.closed().get("shutdown", 0) == 0
        stack.close()
        assert m.process.wait(15) == 0


def test_when_the_time_is_over_what_is_left_is_reset(mesh: Factory) -> None:
    with Server(echo) as server, contextlib.ExitStack() as stack:
        config = {"drain": {"time": "1ms", "over": "300ms"}, "access_log": {"when": "always"}}
        m = mesh(simple(server.address) | config)
        clients = [stack.enter_context(connect(m.port())) for _ in range(30)]
        for client in clients:
            talk(client)
        m.process.send_signal(signal.SIGTERM)
        assert all(read_to_end(client) == (b"", RST) for client in clients)
        assert m.process.wait(15) == 0
        assert [record["reason"] for record in m.records()] == ["shutdown"] * 30
        # Each at a moment of its own.
        assert len({record["time"] for record in m.records()}) > 5


def test_a_second_sigterm_is_impatient(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address) | {"drain": {"time": "1h", "over": "1h"}})
        with connect(m.port()) as client:
            talk(client)
            m.process.send_signal(signal.SIGTERM)
            wait_until(lambda: said(m.events(), "draining"), "it drains")
            talk(client)
            m.process.send_signal(signal.SIGTERM)
            assert read_to_end(client) == (b"", RST)
        assert m.process.wait(15) == 0


def test_a_reload_while_it_drains_changes_nothing(mesh: Factory) -> None:
    with Server(echo) as server:
        config = simple(server.address, listener={"bind": f"127.0.0.1:{free_port()}"}) | {"drain": {"time": "1h", "over": "off"}}
        m = mesh(config)
        port = m.port()
        with connect(port) as client:
            talk(client)
            m.process.send_signal(signal.SIGTERM)
            wait_until(lambda: said(m.events(), "draining"), "it drains")
            m.write(simple(server.address, listener=config["listeners"][0], balance="random"))
            m.process.send_signal(signal.SIGHUP)
            talk(client)
            assert m.status()["generation"] == 1
            assert refuses(port)
        assert m.process.wait(15) == 0


def test_connections_of_an_endpoint_that_is_gone_end_when_asked(mesh: Factory) -> None:
    with Server(echo) as stays, Server(echo) as goes, contextlib.ExitStack() as stack:
        listener = {"bind": f"127.0.0.1:{free_port()}"}
        m = mesh(
            simple(stays.address, goes.address, listener=listener, balance="round_robin", drain={"removed": "100ms"}) | {"workers": 1}
        )
        clients = [stack.enter_context(connect(m.port())) for _ in range(10)]
        for client in clients:
            talk(client)
        m.reload(simple(stays.address, listener=listener, balance="round_robin", drain={"removed": "100ms"}))
        m.wait_closed(endpoint_removed=5)
        ended = 0
        for client in clients:
            client.settimeout(0.0)
            try:
                assert client.recv(1) == b""
            except ConnectionResetError:
                ended += 1
            except BlockingIOError:
                client.settimeout(15)
                talk(client)
        assert ended == 5


def test_sweep_after_sweep_hurries_nobody(mesh: Factory) -> None:
    with Server(echo) as goes, Server(echo) as stays:
        listener = {"bind": f"127.0.0.1:{free_port()}"}
        drain = {"removed": "2h"}
        m = mesh(simple(goes.address, listener=listener, drain=drain))
        with connect(m.port()) as client:
            talk(client)
            for weight in range(1, 8):
                endpoints = [{"address": stays.address, "weight": weight}]
                m.reload({"listeners": [{"name": "web", "cluster": "web"} | listener],
                          "clusters": [{"name": "web", "endpoints": endpoints, "drain": drain}]})  # fmt: skip
                talk(client)


def test_endpoints_that_join_get_their_share_of_live_connections(mesh: Factory) -> None:
    with Server(echo) as first, Server(echo) as second, contextlib.ExitStack() as stack:
        listener = {"bind": f"127.0.0.1:{free_port()}"}
        drain = {"rebalance": "100ms"}
        m = mesh(simple(first.address, listener=listener, drain=drain))
        for _ in range(60):
            talk(stack.enter_context(connect(m.port())))
        m.reload(simple(first.address, second.address, listener=listener, drain=drain))
        # About 30 are picked, each by chance: fewer than 12 or more than 48 would be a matter of one in a million.
        wait_until(lambda: m.closed().get("rebalanced", 0) >= 12, "connections end")
        assert m.closed()["rebalanced"] <= 48
        talk(stack.enter_context(connect(m.port())))
        assert m.opened()[second.address] == 1


def test_connections_are_asked_once_to_make_room_for_an_endpoint(mesh: Factory) -> None:
    with Server(echo) as first, Server(echo) as second, contextlib.ExitStack() as stack:
        bind = f"127.0.0.1:{free_port()}"

        def config(*endpoints: Config, workloads: int = 0) -> Config:
            return {
                "listeners": [{"name": "web", "bind": bind, "cluster": "web"}],
                "clusters": [{"name": "web", "endpoints": list(endpoints), "drain": {"rebalance": "1ms"}}],
                "workloads": [{"name": f"w{number}", "addresses": [f"10.9.9.{number}"]} for number in range(workloads)],
            }

        old = {"address": first.address, "weight": 9}
        m = mesh(config(old))
        for _ in range(60):
            talk(stack.enter_context(connect(m.port())))
        for workloads in range(20):
            # Each makes the workers look at all live connections again.
            m.reload(config(old, {"address": second.address}, workloads=workloads))
        # Six on average; more than 25 would be a matter of one in a thousand million.
        assert m.closed().get("rebalanced", 0) <= 25


def test_endpoints_that_join_two_clusters_at_once_get_their_shares(mesh: Factory) -> None:
    with Server(echo) as first, Server(echo) as second, contextlib.ExitStack() as stack:
        names = ("one", "two")
        binds = {name: f"127.0.0.1:{free_port()}" for name in names}

        def config(*endpoints: Config) -> Config:
            return {
                "workers": 1,
                "listeners": [{"name": name, "bind": binds[name], "cluster": name} for name in names],
                "clusters": [{"name": name, "endpoints": list(endpoints), "drain": {"rebalance": "1ms"}} for name in names],
            }

        old = {"address": first.address}
        m = mesh(config(old))
        for name in names:
            for _ in range(20):
                talk(stack.enter_context(connect(m.port(name))))
        with Tracer(worker_thread(m.process.pid)) as tracer:
            tracer.wait_stopped()
            m.write(config(old, {"address": second.address, "weight": 99}))
            # Of the new plan, and for each cluster.
            wait_until(lambda: wakes(m.process.pid) >= 3, "the worker has been told of everything")
        wait_until(lambda: m.closed().get("rebalanced", 0) >= 30, "connections of both end")
        assert all(m.cluster(name)["closed"]["rebalanced"] >= 10 for name in names)


def test_a_reason_that_is_over_leaves_the_other_one_standing() -> None:
    asyncio.run(_leave_for_two_reasons())


async def _leave_for_two_reasons() -> None:
    with Server(echo) as server, contextlib.ExitStack() as stack:
        config = parse_config(yaml.safe_dump(simple(server.address)))
        listeners, datapath = Listeners(1), Datapath(1, 256, lambda records: None)
        sockets = listeners.open(config)
        datapath.apply(config, sockets, [], 100)
        datapath.start()
        for _ in range(20):
            await asyncio.to_thread(talk, stack.enter_context(connect(sockets["web"][0][0].port)))
        # Nearly all get the earlier time of the first, and keep it when they hear of the second.
        datapath.close_endpoint("web", server.address, CloseReason.ENDPOINT_UNHEALTHY, 1000)
        await asyncio.to_thread(wait_until, lambda: datapath.measure_sources() is not None, "all have been told")
        datapath.close_all(CloseReason.SHUTDOWN, 2000)
        await asyncio.to_thread(wait_until, lambda: datapath.measure_sources() is not None, "all have been told")
        datapath.keep_endpoint("web", server.address)
        await asyncio.to_thread(wait_until, lambda: datapath.active == 0, "all have left")
        datapath.stop()
        listeners.close()


def wakes(pid: int) -> int:
    """The most that an eventfd of the process holds."""
    counts = [0]
    for file in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):
            counts += [int(line.split()[1], 16) for line in file.read_text().splitlines() if line.startswith("eventfd-count:")]
    return max(counts)
