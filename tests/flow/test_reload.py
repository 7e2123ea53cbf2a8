"""Reload: a bad file changes nothing, a good one moves no connection. Invariants 6, 7 and 9 of the design."""

import os
import shutil
import signal
import socket
import threading
from pathlib import Path

import yaml

from tests.conftest import Factory
from tests.flow.test_tls import client_context, inbound
from tests.support.certificates import Files
from tests.support.mesh import Config, simple
from tests.support.peers import Server, black_hole, closed_port, connect, echo, is_refused, read_to_end, talk
from tests.support.proxies import free_port
from tests.support.waiting import wait_until

BOUNDED = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
"""Root reads everything, unless it may not."""


def named(name: bytes) -> Server:
    return Server(lambda peer: peer.sendall(name))


def ask(port: int) -> bytes:
    with connect(port) as client:
        return read_to_end(client)[0]


def test_live_connections_stay_where_they_are_and_new_ones_follow_the_new_plan(mesh: Factory) -> None:
    with Server(echo) as old, named(b"new") as new:
        config = simple(old.address, listener={"bind": f"127.0.0.1:{free_port()}"})
        m = mesh(config)
        port = m.port()
        with connect(port) as client:
            talk(client)
            m.reload(simple(new.address, listener=config["listeners"][0]))
            assert ask(port) == b"new"
            talk(client)
        assert m.opened() == {new.address: 1}
        wait_until(lambda: m.total("l4mesh_connections_closed_total") == 2, "both ends are counted")


def test_an_endpoint_that_was_away_comes_back_with_the_connections_that_it_still_has(mesh: Factory) -> None:
    with Server(echo) as flaps, Server(echo) as other:
        more: Config = {"listener": {"bind": f"127.0.0.1:{free_port()}"}, "limits": {"connections_per_endpoint": 1}}
        m = mesh(simple(flaps.address, **more))
        port = m.port()
        with connect(port) as client:
            talk(client)
            m.reload(simple(other.address, **more))
            m.reload(simple(flaps.address, other.address, **more))
            assert {one["address"]: one["active"] for one in m.cluster()["endpoints"]} == {flaps.address: 1, other.address: 0}
            with connect(port) as second:
                talk(second)
                assert is_refused(port)
            talk(client)
        wait_until(lambda: not any(one["active"] for one in m.cluster()["endpoints"]), "both endpoints are free again")
        with connect(port) as client:
            talk(client)
        assert flaps.accepted + other.accepted == 3
        m.wait_closed(limit_endpoint=1)


def test_a_bad_file_changes_nothing_and_is_shown(mesh: Factory) -> None:
    with named(b"good") as server:
        good = simple(server.address, listener={"bind": f"127.0.0.1:{free_port()}"})
        m = mesh(good)
        bad = simple("nonsense", listener=good["listeners"][0], balance="fastest")
        m.write(bad)
        wait_until(lambda: m.status()["config"]["failed"] >= 1, "the bad file is seen")
        error = m.status()["config"]["last_error"]
        assert len(error) == 2
        assert "clusters[0].balance" in error[0] + error[1]
        assert str(m.file) in error[0]
        assert m.status()["generation"] == 1
        assert m.total("l4mesh_config_last_reload_success") == 0
        assert ask(m.port()) == b"good"
        refusals = [event for event in m.events() if event["event"] == "config_refused"]
        m.process.send_signal(1)
        wait_until(lambda: m.status()["config"]["failed"] >= 2, "it is looked at again")
        assert len([event for event in m.events() if event["event"] == "config_refused"]) == len(refusals) == 1
        m.write(good)
        wait_until(lambda: m.status()["config"]["last_error"] is None, "all is well again")
        assert m.status()["generation"] == 1


def test_a_folder_that_can_t_be_read_changes_nothing(mesh: Factory) -> None:
    with named(b"good") as server:
        m = mesh(simple(server.address), prefix=BOUNDED)
        m.file.parent.chmod(0)
        m.process.send_signal(signal.SIGHUP)
        wait_until(lambda: m.status()["config"]["failed"] >= 1, "it is seen")
        assert m.status()["config"]["last_error"] == [f"{m.file.parent}: can't be read: Permission denied"]
        m.file.parent.chmod(0o755)
        m.process.send_signal(signal.SIGHUP)
        wait_until(lambda: m.status()["config"]["last_error"] is None, "all is well again")
        assert ask(m.port()) == b"good"


def test_what_lies_below_the_folder_is_not_watched(mesh: Factory) -> None:
    with named(b"old") as old, named(b"new") as new:
        m = mesh(simple(old.address), prefix=BOUNDED)
        m.stop()
        (m.file.parent / "closed").mkdir(0)
        m.start()
        m.reload(simple(new.address))
        assert ask(m.port()) == b"new"
        assert not [event for event in m.events() if event["event"] == "config_watch_interrupted"]


def test_a_file_that_is_linked_is_watched_where_it_is(mesh: Factory) -> None:
    with named(b"old") as old, named(b"new") as new:
        m = mesh(simple(old.address, listener={"bind": f"127.0.0.1:{free_port()}"}))
        link, m.file = m.file, m.folder / "elsewhere" / m.file.name
        m.file.parent.mkdir()
        link.rename(m.file)
        link.symlink_to(m.file)
        m.reload(simple(new.address, listener={"bind": f"127.0.0.1:{m.port()}"}))
        assert ask(m.port()) == b"new"


def test_a_folder_in_the_place_of_another_is_watched(mesh: Factory) -> None:
    with named(b"old") as old, named(b"new") as new:
        m = mesh(simple(old.address))
        folder, before = m.file.parent, m.folder / "before"
        replacement = m.folder / "replacement"
        shutil.copytree(folder, replacement)
        folder.rename(before)
        replacement.rename(folder)
        m.reload(simple(new.address))
        assert ask(m.port()) == b"new"


def test_a_link_on_the_way_that_leads_elsewhere_is_followed(mesh: Factory) -> None:
    with named(b"old") as old, named(b"new") as new, named(b"newest") as newest:
        m = mesh(simple(old.address))
        m.stop()
        folder, first, second = m.file.parent, m.folder / "elsewhere" / "first", m.folder / "elsewhere" / "second"
        first.parent.mkdir()
        folder.rename(first)
        folder.symlink_to(first)
        m.start()
        shutil.copytree(first, second)
        link = m.folder / "link"
        link.symlink_to(second)
        file, m.file = m.file, second / m.file.name
        m.write(simple(new.address))
        generation = m.status()["generation"]
        link.rename(folder)
        wait_until(lambda: m.status()["generation"] > generation, "what is behind the new link is in force")
        assert ask(m.port()) == b"new"
        m.file = file
        m.reload(simple(newest.address))
        assert ask(m.port()) == b"newest"


def test_a_port_that_is_taken_refuses_the_whole_change(mesh: Factory) -> None:
    with named(b"good") as server:
        config = simple(server.address, listener={"bind": f"127.0.0.1:{free_port()}"})
        m = mesh(config)
        second = {"name": "second", "bind": server.address, "cluster": "web"}
        m.write(config | {"listeners": [*config["listeners"], second]})
        wait_until(lambda: m.status()["config"]["failed"] >= 1, "the change is refused")
        assert "another process has it" in m.status()["config"]["last_error"][0]
        assert ask(m.port()) == b"good"


def test_a_rewrite_without_a_change_is_none(mesh: Factory) -> None:
    with named(b"same") as server:
        config = simple(server.address)
        m = mesh(config)

        def seen() -> bool:
            # Again and again: one before the watch is there is no change to it.
            m.write(config)
            return bool(m.status()["config"]["unchanged"] >= 1)

        wait_until(seen, "the rewrite is seen", every_s=0.5)
        assert m.status()["generation"] == 1


def test_listeners_come_and_go(mesh: Factory) -> None:
    with Server(echo) as server:
        ports = [free_port(), free_port()]
        both = simple(server.address)
        both["listeners"] = [{"name": f"l{p}", "bind": f"127.0.0.1:{p}", "cluster": "web"} for p in ports]
        one = both | {"listeners": both["listeners"][:1]}
        m = mesh(one)
        m.reload(both)
        with connect(ports[0]) as first, connect(ports[1]) as second:
            talk(first)
            talk(second)
            m.reload(one)
            talk(second)
            wait_until(lambda: _is_closed(ports[1]), "the removed listener is closed")
            with connect(ports[0]) as third:
                talk(third)
            talk(first)
        wait_until(lambda: m.active() == 0, "all have ended")
        removed = 'l4mesh_listener_connections_opened_total{listener="(removed)"}'
        wait_until(lambda: m.metrics()[removed] == 1, "what the removed listener counted is kept")


def _is_closed(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except ConnectionRefusedError:
        return True
    return False


def test_kubernetes_swaps_its_data_link(mesh: Factory, tmp_path: Path) -> None:
    with named(b"one") as one, named(b"two") as two:
        port = free_port()
        listener = {"bind": f"127.0.0.1:{port}"}
        m = mesh(simple(one.address, listener=listener))
        folder = m.file.parent

        def publish(version: str, config: Config) -> None:
            data = folder / f"..{version}"
            data.mkdir()
            (data / "mesh.yaml").write_text(yaml.safe_dump(config | m._settings))
            link = folder / "..tmp"
            link.symlink_to(data.name)
            link.rename(folder / "..data")

        publish("v1", simple(one.address, listener=listener))
        (folder / "mesh.yaml").symlink_to("..data/mesh.yaml")
        m.file.unlink()
        # What is there before the watch is, is no change to it.
        m.process.send_signal(signal.SIGHUP)
        wait_until(lambda: m.status()["config"]["last_error"] is None and m.status()["config"]["unchanged"], "v1 is seen")
        assert ask(port) == b"one"
        publish("v2", simple(two.address, listener=listener))
        wait_until(lambda: ask(port) == b"two", "v2 is in force")


def test_a_thousand_rewrites_leak_nothing(mesh: Factory) -> None:
    with Server(echo) as server:
        listener = {"bind": f"127.0.0.1:{free_port()}"}
        m = mesh(simple(server.address, listener=listener))
        m.reload(simple(server.address, listener=listener, balance="random"))
        before = m.count_descriptors()
        alive = 0
        with connect(m.port()) as client:
            for turn in range(1000):
                m.write(simple(server.address, listener=listener, limits={"connections": turn + 1}))
                if turn % 50 == 0:
                    talk(client)
                    alive = max(alive, m.status()["plans_alive"])
            wait_until(
                lambda: next(c for c in m.get("/config")["clusters"].values())["max_connections"] == 1000,
                "the last one is in force",
            )
            talk(client)
        assert alive <= 2
        assert m.status()["plans_alive"] == 1
        assert m.status()["config"]["failed"] == 0
        wait_until(lambda: m.count_descriptors() <= before, "no descriptor is lost")


def test_endpoints_that_come_and_go_under_load_fail_no_connection(mesh: Factory) -> None:
    with Server(echo) as a, Server(echo) as b, Server(echo) as c:
        listener = {"bind": f"127.0.0.1:{free_port()}"}
        dead = [f"127.0.0.1:{closed_port()}" for _ in range(2)]
        lists = [(a.address, b.address), (b.address, *dead), (c.address, a.address, dead[0]), (dead[1], c.address)]
        m = mesh(simple(*lists[0], listener=listener))
        port = m.port()
        stop = threading.Event()
        failures: list[BaseException] = []
        done = [0]

        def load() -> None:
            turn = 0
            while not stop.is_set():
                turn += 1
                try:
                    with connect(port, source=f"127.0.0.{2 + turn % 100}") as client:
                        talk(client)
                except BaseException as error:
                    failures.append(error)
                done[0] += 1

        thread = threading.Thread(target=load)
        thread.start()
        for turn in range(40):
            replace = m.reload if turn % 5 == 0 else m.write
            replace(simple(*lists[turn % 4], listener=listener, balance="round_robin", limits={"connections": 500 + turn}))
            wait_until(lambda due=20 * (turn + 1): done[0] > due or failures, "connections go on")  # type: ignore[misc]
        m.reload(simple(*lists[1], listener=listener, balance="round_robin"))
        refused = m.total("l4mesh_connect_failures_total")
        wait_until(lambda: m.total("l4mesh_connect_failures_total") > refused or failures, "a dial is refused, and retried")
        stop.set()
        thread.join()
        assert failures == []


def test_a_large_configuration_loads_and_one_change_is_cheap(mesh: Factory) -> None:
    # 5,000 clusters with 50,000 endpoints, in 50 files.
    with Server(echo) as server:
        config = simple(server.address)
        m = mesh(config)
        folder = m.file.parent
        for number in range(50):
            clusters = [{"name": f"c{number}-{i}", "endpoints": [f"10.{number}.{i}.{e + 1}:80" for e in range(10)]} for i in range(100)]
            (folder / f"n{number:02}.yaml").write_text(yaml.safe_dump({"clusters": clusters}, default_flow_style=None))
        wait_until(lambda: len(m.get("/config").get("clusters", {})) == 5001, "all files are in force", 60)
        with connect(m.port()) as client:
            talk(client)
            generation = m.status()["generation"]
            file = folder / "n07.yaml"
            text = file.read_text().replace("10.7.0.1:80", "10.7.0.99:80")
            cpu_s = m.cpu_s()
            new = folder / ".new"
            new.write_text(text)
            os.rename(new, file)
            wait_until(lambda: m.status()["generation"] > generation, "the change is in force", 60)
            assert m.cpu_s() - cpu_s < 3
            talk(client)


def test_a_dial_under_way_goes_on_among_the_endpoints_it_began_with(mesh: Factory) -> None:
    # What the old endpoints count in must stay for as long as a dial may still pick one of them.
    with named(b"old") as old, named(b"new") as new, black_hole() as hole:
        listener = {"bind": f"127.0.0.1:{free_port()}"}
        zones = {"node": {"name": "n", "zone": "z"}}
        config = simple(listener=listener, connect={"timeout": "3s"}) | zones
        config["clusters"][0]["endpoints"] = [
            {"address": f"127.0.0.1:{hole}", "zone": "z"},
            {"address": old.address, "zone": "far"},
        ]
        m = mesh(config)
        with connect(m.port()) as client:
            wait_until(lambda: m.active() == 1, "the dial is under way")
            m.reload(simple(new.address, listener=listener) | zones)
            assert ask(m.port()) == b"new"
            assert read_to_end(client) == (b"old", "FIN")


def test_a_handshake_under_way_counts_in_the_cluster_that_it_was_routed_to(mesh: Factory, web: Files, redis: Files) -> None:
    with Server(echo) as server:
        config = inbound(redis, server.address)
        config["listeners"][0]["bind"] = f"127.0.0.1:{free_port()}"
        m = mesh(config)
        with connect(m.port()) as plain:
            wait_until(lambda: m.active() == 1, "the handshake is under way")
            config["listeners"][0]["cluster"] = "new"
            m.reload(config | {"clusters": [{"name": "new", "endpoints": [server.address]}]})
            reloaded_s = m.status()["uptime_s"]
            # What is removed is looked at every second, and forgotten when it was idle twice.
            wait_until(lambda: m.status()["uptime_s"] > reloaded_s + 3.5, "what is removed and idle is forgotten")
            with client_context(web, web.bundle).wrap_socket(plain) as client:
                talk(client)
                assert m.metrics()['l4mesh_connections_active{cluster="(removed)"}'] == 1
        [record] = wait_until(m.records, "it is in the access log")
        assert record["cluster"] == "app"
        assert m.metrics()['l4mesh_connections_opened_total{cluster="(removed)"}'] == 1
