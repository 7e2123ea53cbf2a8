"""What systemd is told of the life of the service (sd_notify(3)), where it wants to know."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping


def notify(**fields: str | int) -> None:
    """Sends e.g. ``READY=1`` to the socket that NOTIFY_SOCKET names; nothing where it does not. Never raises: it may be gone."""
    _send(0, fields)


class Heartbeat:
    """``WATCHDOG=1``, twice in the time after which systemd ends a service that is silent; nothing where it waits for none."""

    def __init__(self) -> None:
        self._every_s = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6
        self.due_at = 0.0 if self._every_s else float("inf")
        """By the monotonic clock."""

    def beat(self) -> None:
        """When it is due. Does not wait: one that finds no room is missed by nobody but who can't read."""
        if (now := time.monotonic()) >= self.due_at:
            self.due_at = now + self._every_s
            _send(socket.MSG_DONTWAIT, {"WATCHDOG": 1})


def _send(flags: int, fields: Mapping[str, str | int]) -> None:
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    message = "\n".join(f"{name}={value}" for name, value in fields.items())
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        # A leading @ stands for the zero byte of an abstract address.
        sender.sendto(message.encode(), flags, "\0" + path[1:] if path.startswith("@") else path)
