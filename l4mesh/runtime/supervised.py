"""The data plane's end of the socket to the one that started it (``supervisor.py``)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from l4mesh.capture.rules import build_rules
from l4mesh.model import Config
from l4mesh.runtime.channel import DESCRIPTORS_MAX, Channel, PeerGone
from l4mesh.runtime.supervisor import CHANNEL, encode_rules


@dataclass(frozen=True, slots=True)
class Supervision:
    """What the supervisor said last."""

    restarts: int = 0
    """Of data planes that died."""
    in_place: bool = False
    """The rules are."""
    repairs: int = 0
    differences: Sequence[str] = ()
    """Of the last repair, the first ones."""
    error: str = ""
    """Why the rules are not in place."""


class Successor:
    """A process that the supervisor starts to take over from this one. Its methods may be called from any thread."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._code: int | None = None

    def ended(self, code: int) -> None:
        self._code = code

    def poll(self) -> int | None:
        """Its exit code; None: it runs, or is about to."""
        return self._code

    def kill(self) -> None:
        self._tell("abandon")


class Supervised:
    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, keeper: Channel, kept: Sequence[socket.socket]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._keeper = keeper
        self._keeps: Sequence[socket.socket] = ()
        self.kept = kept
        """Listening sockets of the process that this one replaces. The caller's to close."""
        self._loop = asyncio.get_running_loop()
        self._successor: Successor | None = None
        self.status = Supervision()

    @classmethod
    async def connect(cls) -> Supervised | None:
        """None: nobody supervises this process."""
        # Not for processes that this one starts.
        descriptors = os.environ.pop(CHANNEL, "")
        if not descriptors:
            return None
        connected, keeper, *kept = (socket.socket(fileno=int(descriptor)) for descriptor in descriptors.split(","))
        for one in (connected, keeper, *kept):
            one.set_inheritable(False)
        return cls(*await asyncio.open_connection(sock=connected), Channel(keeper), kept)

    async def listen(self, gone: Callable[[], None]) -> None:
        """Hears what the supervisor says, until cancelled. ``gone`` is called when it is not there any more."""
        with contextlib.suppress(OSError):
            while line := await self._reader.readline():
                message = json.loads(line)
                if message["say"] == "status":
                    self.status = Supervision(message["restarts"], **message["redirect"])
                elif message["say"] == "successor_ended" and self._successor:
                    self._successor.ended(message["code"])
        gone()
        await asyncio.Event().wait()

    def _tell(self, say: str, **fields: object) -> None:
        self._writer.write(json.dumps({"say": say, **fields}).encode() + b"\n")

    def serves(self, config: Config) -> None:
        """Connections are accepted: captured ones may come."""
        self._want("ready", config)

    def wants(self, config: Config) -> None:
        """The configuration has changed, and with it maybe the rules."""
        self._want("rules", config)

    def _want(self, say: str, config: Config) -> None:
        redirect = config.redirect
        self._tell(
            say, rules=encode_rules(build_rules(config)), on_crash=redirect.on_crash, check_interval_ms=redirect.check_interval_ms
        )

    def keep(self, listening: Sequence[socket.socket]) -> None:
        """Gives the listening sockets to the supervisor, for the process that replaces this one when it dies. Blocks; not for several
        threads at once."""
        if listening == self._keeps:
            return
        self._keeps = listening
        descriptors = [one.fileno() for one in listening]
        with contextlib.suppress(PeerGone):
            self._keeper.send("keep", {"of": len(descriptors)}, descriptors=descriptors[:DESCRIPTORS_MAX])
            for first in range(DESCRIPTORS_MAX, len(descriptors), DESCRIPTORS_MAX):
                self._keeper.send("keep_more", descriptors=descriptors[first : first + DESCRIPTORS_MAX])

    def drains(self) -> None:
        """This process is about to end, as it was told to."""
        self._tell("drains")

    def start_successor(self) -> Successor:
        """From any thread."""
        self._successor = Successor(self._tell_from_anywhere)
        self._tell_from_anywhere("upgrade")
        return self._successor

    def _tell_from_anywhere(self, say: str) -> None:
        self._loop.call_soon_threadsafe(self._tell, say)

    def hands_over(self) -> None:
        """Another process serves."""
        self._tell("hands_over")

    def close(self) -> None:
        self._writer.close()
        self._keeper.close()
