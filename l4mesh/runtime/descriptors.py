"""How many descriptors a process of ours may have open."""

from __future__ import annotations

import resource


def raise_descriptor_limit() -> int:
    """Raises RLIMIT_NOFILE to its hard limit and gives it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = 1 << 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
