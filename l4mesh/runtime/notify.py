"""What systemd is told of the life of the service (sd_notify), where it wants to know."""

from __future__ import annotations

import os
import socket

import structlog

log = structlog.get_logger()


def notify(**fields: str | int) -> None:
    """Sends e.g. ``READY=1`` to the socket that NOTIFY_SOCKET names; nothing where it does not."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    message = "\n".join(f"{name}={value}" for name, value in fields.items())
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(message.encode(), "\0" + path[1:] if path.startswith("@") else path)
    except OSError as error:
        log.warning("notify_failed", socket=path, error=error.strerror)
