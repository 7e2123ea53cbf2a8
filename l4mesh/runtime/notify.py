"""What systemd is told of the life of the service (sd_notify(3)), where it wants to know."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(**fields: str | int) -> None:
    """Sends e.g. ``READY=1`` to the socket that NOTIFY_SOCKET names; nothing where it does not. Never raises: it may be gone."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    message = "\n".join(f"{name}={value}" for name, value in fields.items())
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        # A leading @ stands for the zero byte of an abstract address.
        sender.sendto(message.encode(), "\0" + path[1:] if path.startswith("@") else path)
