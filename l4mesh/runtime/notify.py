"""What a service manager is told (sd_notify(3))."""

from __future__ import annotations

import os
import socket


def notify(*states: str) -> None:
    """Sends ``READY=1`` and the like to the one that started us, if it asked for it. Never raises: it may be gone."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            # A leading @ stands for the zero byte of an abstract address.
            sender.connect("\0" + address[1:] if address.startswith("@") else address)
            sender.send("\n".join(states).encode())
        except OSError:
            pass
