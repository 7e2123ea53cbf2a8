"""The identities in use: the newest that are good. A file that turns bad changes nothing but what is said about it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from l4mesh.errors import ConfigError, Problem
from l4mesh.identity.svid import IdentityError, Material, load_identity
from l4mesh.model import Identity

EXPIRY_WARNING_SHARE = 0.2
"""A certificate with less than this share of its life left should have been renewed."""


Event = tuple[str, dict[str, object]]
"""A name and fields."""


@dataclass(frozen=True, slots=True)
class IdentityStatus:
    """What the status, the metrics and the log say about an identity."""

    name: str
    spiffe_id: str
    expires_unix_s: float
    crl_until_unix_s: float
    loaded: int
    """Times that its files have changed to something good."""
    refused: int
    error: str
    """Of the newest look; "" when that one succeeded."""
    in_use: bool
    """False until the CA has given the first certificate."""
    serial: int
    """Of the certificate; 0 until there is one."""


@dataclass(slots=True)
class _Entry:
    identity: Identity
    signature: tuple[tuple[int, ...] | None, ...]
    material: Material | None
    error: str = ""
    loaded: int = 0
    refused: int = 0


class IdentityStore:
    """Not thread-safe: belongs to the thread that loads configurations.

    ``try_out`` raises ValueError for what the data path can't shake hands with.
    """

    def __init__(self, try_out: Callable[[Material], None] = lambda material: None) -> None:
        self._try_out = try_out
        self._entries: dict[str, _Entry] = {}
        self._looked: dict[str, _Entry] = {}
        self.events: list[Event] = []
        """What the last refresh wants to be logged."""

    def refresh(self, identities: Mapping[str, Identity], now_unix_s: float | None = None) -> dict[str, Material]:
        """Looks at the files and gives what is good. What it found counts when ``keep`` says that it is in use.

        Raises ConfigError for an identity that is new and can't be used. One that was good before keeps what it had. One that comes
        from the CA may be missing: it is left out until it is there.
        """
        self.events = []
        problems: list[Problem] = []
        entries: dict[str, _Entry] = {}
        now_unix_s = time.time() if now_unix_s is None else now_unix_s
        for name, identity in identities.items():
            entry = entries[name] = self._look(identity, now_unix_s)
            if entry.material is None and not identity.spiffe_id:
                problems.append(Problem(identity.certificate, 0, f"identity {name}", entry.error))
        if problems:
            raise ConfigError(problems)
        self._looked = entries
        return {name: entry.material for name, entry in entries.items() if entry.material}

    def keep(self) -> None:
        """What the last refresh gave is in use."""
        self._entries = self._looked

    def _look(self, identity: Identity, now_unix_s: float) -> _Entry:
        before = self._entries.get(identity.name)
        if before and before.identity != identity:
            # Other files are another identity as far as what is good goes; the old one serves until they are.
            before = _Entry(identity, (), before.material, before.error, before.loaded, before.refused)
        signature = tuple(map(_sign, identity.files))
        if before and before.signature == signature and not before.error:
            return before
        try:
            material = self._load(identity, now_unix_s)
        except IdentityError as error:
            if before is None:
                return _Entry(identity, signature, None, str(error))
            if str(error) != before.error:
                goes_on_with = "the last good one" if before.material else "none: connections that need it are refused"
                self.events.append(("identity_refused", {"identity": identity.name, "error": str(error), "goes_on_with": goes_on_with}))
            return _Entry(
                identity, signature, before.material, str(error), before.loaded, before.refused + (str(error) != before.error)
            )
        if before and before.material and before.material.digest == material.digest:
            return _Entry(identity, signature, before.material, "", before.loaded, before.refused)
        for warning in material.warnings:
            self.events.append(("identity_warning", {"identity": identity.name, "warning": warning}))
        if before and before.material:
            self.events.append(("identity_rotated", {"identity": identity.name, "spiffe_id": material.spiffe_id}))
        self.events += _overdue(material, now_unix_s)
        return _Entry(identity, signature, material, "", (before.loaded if before else 0) + 1, before.refused if before else 0)

    def _load(self, identity: Identity, now_unix_s: float) -> Material:
        """Raises IdentityError."""
        material = load_identity(identity, now_unix_s)
        try:
            # Here, where it concerns one identity, and not in a plan, which needs all of them.
            self._try_out(material)
        except ValueError as error:
            raise IdentityError(f"{identity.certificate}: {error}") from None
        return material

    def status(self) -> list[IdentityStatus]:
        return [
            IdentityStatus(
                name,
                entry.material.spiffe_id if entry.material else entry.identity.spiffe_id,
                entry.material.expires_unix_s if entry.material else 0.0,
                entry.material.crl_until_unix_s if entry.material else 0.0,
                entry.loaded, entry.refused, entry.error,
                entry.material is not None,
                entry.material.serial if entry.material else 0,
            )
            for name, entry in list(self._entries.items())
        ]  # fmt: skip

    def overdue(self, now_unix_s: float) -> list[Event]:
        """What should have been renewed by now and serves on, to be logged as warnings."""
        return [event for entry in list(self._entries.values()) if entry.material for event in _overdue(entry.material, now_unix_s)]


def _overdue(material: Material, now_unix_s: float) -> list[Event]:
    events: list[Event] = []
    life_s = material.expires_unix_s - material.not_before_unix_s
    left_s = material.expires_unix_s - now_unix_s
    if left_s < life_s * EXPIRY_WARNING_SHARE:
        state = "expires soon" if left_s > 0 else "has expired: handshakes fail"
        events.append(("identity_expires", {"identity": material.name, "state": state, "left_s": round(left_s)}))
    if 0 < material.crl_until_unix_s <= now_unix_s:
        late_s = round(now_unix_s - material.crl_until_unix_s)
        state = "has a revocation list that is out of date: what was revoked since is trusted"
        events.append(("crl_out_of_date", {"identity": material.name, "since_s": late_s, "state": state}))
    return events


def _sign(path: str) -> tuple[int, ...] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
