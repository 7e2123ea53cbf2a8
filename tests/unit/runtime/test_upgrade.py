"""A process that takes over, and running ones that do not keep to the protocol."""

import asyncio
import errno
import gc
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from l4mesh.config.load import parse_config
from l4mesh.datapath import CARRIED_BYTES, Datapath
from l4mesh.errors import CommandError
from l4mesh.runtime import upgrade
from l4mesh.runtime.channel import Channel
from l4mesh.runtime.listeners import Listeners
from l4mesh.runtime.upgrade import Takeover, UpgradeServer, request_upgrade

Script = Callable[[Channel], Any]


@contextmanager
def running(path: Path, script: Script) -> Iterator[None]:
    """A running process that follows the script with the one caller that it gets."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(path))
        listening.listen()

        def answer() -> None:
            connected, _ = listening.accept()
            channel = Channel(connected)
            channel.receive(10, "takeover", "replace")
            script(channel)
            channel.close()

        thread = threading.Thread(target=answer)
        thread.start()
        yield
        thread.join(15)
        assert not thread.is_alive()


def offer(channel: Channel, places: object, **more: object) -> None:
    body = {"pid": 1, "version": "test", "admin": "", "places": places, "sockets": 1} | more
    with socket.socket(socket.AF_UNIX) as upgrade:
        channel.send("offer", body, descriptors=[upgrade.fileno()])


def test_nobody_there_is_none(tmp_path: Path) -> None:
    assert Takeover.find(str(tmp_path / "none")) is None
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stale:
        stale.bind(str(tmp_path / "stale"))
    assert Takeover.find(str(tmp_path / "stale")) is None
    with pytest.raises(CommandError, match="no process runs at"):
        request_upgrade(str(tmp_path / "stale"))


def test_what_is_no_upgrade_socket_is_told(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "other"))
        other.listen()
        with pytest.raises(CommandError, match="can't reach"):
            Takeover.find(str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (lambda channel: None, "hands nothing over: the other process is gone"),
        (lambda channel: channel.send("refused", {"why": "not today"}), "upgrade: not today"),
        (lambda channel: channel.send("taken"), "instead of offer or refused"),
        (lambda channel: offer(channel, [], sockets="many"), "the offer makes no sense"),
        (lambda channel: offer(channel, [["127.0.0.1", 80, False, "", 3]]), "the offer makes no sense"),
        (lambda channel: offer(channel, None), "the offer makes no sense"),
        (lambda channel: offer(channel, [], verdicts=[]), "the offer makes no sense"),
        (lambda channel: offer(channel, [], verdicts={"health": {"a": [["x"]]}}), "the offer makes no sense"),
        (lambda channel: offer(channel, [], verdicts={"health": {"a": 1}}), "the offer makes no sense"),
        (lambda channel: offer(channel, [], verdicts={"ejections": {"a": [["x", 1, "2"]]}}), "the offer makes no sense"),
        (lambda channel: offer(channel, [], sockets=2), "hands nothing over: the other process is gone"),
    ],
    ids=[
        "leaves",
        "refuses",
        "nonsense",
        "number",
        "too few",
        "no places",
        "no verdicts",
        "half a verdict",
        "one number",
        "another type",
        "no more",
    ],
)
def test_an_offer_that_is_none_is_told_and_leaves_nothing(tmp_path: Path, script: Script, error: str) -> None:
    # What tests before have left to the collector is none of ours.
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with running(tmp_path / "up", script), pytest.raises(CommandError, match=error):
        Takeover.find(str(tmp_path / "up"))
    assert len(os.listdir("/proc/self/fd")) == before


def hands_over(bad: list[tuple[bytes, int]]) -> Script:
    """Offers, and then hands over each of ``bad``: a state and how many descriptors come with it."""

    def script(channel: Channel) -> None:
        offer(channel, [])
        channel.receive(10, "ready")
        for state, descriptors in bad:
            of = [[len(state), descriptors, "web", "web", ""]]
            channel.send("connections", {"worker": 0, "of": of}, state, [0] * descriptors)
            assert channel.receive(10, "taken", "not_taken").body["say"] == "not_taken"
        channel.send("connections", {"worker": 0, "of": [["x"]]})
        channel.receive(10, "not_taken")
        channel.send("connections", {"worker": 0, "of": [[1, 1, "", "", ""]]})
        channel.receive(10, "not_taken")
        channel.send("yours", {"totals": {}})
        channel.receive(10, "serving")

    return script


def test_connections_that_are_none_are_not_taken_and_leave_nothing(tmp_path: Path) -> None:
    state = bytes(CARRIED_BYTES)
    bad = [
        (b"", 2),
        (state[:-1], 2),
        (state + b"x", 2),
        (state, 1),
        (state, 3),
        (b"\xff" * CARRIED_BYTES, 2),
        (b"\xff" * CARRIED_BYTES, 6),
    ]

    async def take_over() -> None:
        config = parse_config(
            'listeners: [{name: web, bind: "127.0.0.1:0", cluster: web}]\nclusters: [{name: web, endpoints: ["127.0.0.1:9"]}]'
        )
        datapath = Datapath(1, 1000, lambda _: None)
        listeners = Listeners(1)
        datapath.apply(config, listeners.open(config), [], 100)
        datapath.start()
        await asyncio.to_thread(datapath.wait_until_seen)
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        with running(tmp_path / "up", hands_over(bad)):
            takeover = Takeover.find(str(tmp_path / "up"))
            assert takeover
            await asyncio.to_thread(takeover.complete, datapath)
            takeover.serve()
            await asyncio.to_thread(takeover.follow, datapath)
            assert takeover.is_over
            takeover.close()
        # One stays: what steers the worker.
        assert len(os.listdir("/proc/self/fd")) == before + 1
        assert datapath.active == 0
        datapath.stop()
        listeners.close()

    asyncio.run(take_over())


def test_the_command_hears_why_not(tmp_path: Path) -> None:
    with (
        running(tmp_path / "up", lambda channel: channel.send("refused", {"why": "for want of memory"})),
        pytest.raises(CommandError, match="the running process goes on: for want of memory"),
    ):
        request_upgrade(str(tmp_path / "up"))
    with ExitStack() as stack:
        stack.enter_context(running(tmp_path / "gone", lambda channel: None))
        with pytest.raises(CommandError, match="does not say how the upgrade went"):
            request_upgrade(str(tmp_path / "gone"))


class WithoutDescriptors(socket.socket):
    """Its first accept finds no descriptor left."""

    tries = 0

    def accept(self) -> Any:
        self.tries += 1
        if self.tries == 1:
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def test_a_caller_for_whom_no_descriptor_is_left_waits_and_nothing_spins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def serve() -> None:
        loop = asyncio.get_running_loop()
        with WithoutDescriptors(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
            listening.bind(str(tmp_path / "upgrade"))
            listening.listen()
            server = UpgradeServer(cast("Any", None))
            server.listen("", listening)
            server.answer()
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
                caller.connect(str(tmp_path / "upgrade"))
                while not listening.tries:
                    await asyncio.sleep(0)
                for _ in range(100):
                    await asyncio.sleep(0)
                assert listening.tries == 1
                # As when the pause is over.
                server.answer()
                channel = Channel(caller)
                channel.send("replace", {"protocol": 0, "version": "test"})
                answer = await loop.run_in_executor(None, channel.receive, 10, "refused")
                assert "can't take over" in answer.body["why"]
                assert listening.tries == 2
            await server.stop(remove_path=False)

    monkeypatch.setattr(upgrade, "ACCEPT_AGAIN_S", 3600)
    asyncio.run(serve())
