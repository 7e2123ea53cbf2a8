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
    """Of the last repair."""
    error: str = ""
    """Why the rules are not in place."""


class Supervised:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.status = Supervision()

    @classmethod
    async def connect(cls) -> Supervised | None:
        """None: nobody supervises this process."""
        # Not for processes that this one starts.
        descriptor = os.environ.pop(CHANNEL, "")
        if not descriptor:
            return None
        connected = socket.socket(fileno=int(descriptor))
        connected.set_inheritable(False)
        return cls(*await asyncio.open_connection(sock=connected))

    async def listen(self, gone: Callable[[], None]) -> None:
        """Hears what the supervisor says, until cancelled. ``gone`` is called when it is not there any more."""
        with contextlib.suppress(OSError):
            while line := await self._reader.readline():
                message = json.loads(line)
                if message["say"] == "status":
                    self.status = Supervision(message["restarts"], **message["redirect"])
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

    def drains(self) -> None:
        """This process is about to end, as it was told to."""
        self._tell("drains")

    def close(self) -> None:
        self._writer.close()
