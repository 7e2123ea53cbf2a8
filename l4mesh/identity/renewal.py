"""When this node asks the CA for what, and what it takes for an answer. No clock, no sockets: those are the caller's."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from l4mesh.config.files import open_file
from l4mesh.errors import CommandError
from l4mesh.identity.ca import CertificateAuthority, Issued, write_file
from l4mesh.identity.svid import UNREADABLE, IdentityError, Material, judge_identity
from l4mesh.model import Identity

RENEW_AT = 0.5
"""Share of a certificate's life after which it is renewed."""
JITTER = 0.1
"""Nodes that began together don't ask together: dates move by up to this share."""
MOST_RETRIES = 60
"""The longest time between two attempts, as a multiple of the first."""
LEFT_SHARE = 0.1
"""An attempt is due at the latest when this share of the time to expiry is over: the nearer the end, the more often."""


@dataclass(slots=True)
class Task:
    """One identity, or the trust of all of them, and how its renewal goes."""

    name: str
    """Of the identity; "" for bundle and revocation lists."""
    spiffe_id: str
    due_unix_s: float
    expires_unix_s: float = 0.0
    """0.0: there is nothing yet."""
    renewed_unix_s: float = 0.0
    succeeded: int = 0
    failed: int = 0
    failures: int = 0
    """Since the last success."""
    error: str = ""


class Schedule:
    """``random`` gives numbers from 0 to 1. All times are seconds, dates unix time."""

    def __init__(self, retry_s: float, trust_interval_s: float, random: Callable[[], float]) -> None:
        self._retry_s = retry_s
        self._trust_interval_s = trust_interval_s
        self._random = random
        self._trust = Task("", "", 0.0)
        self._tasks: dict[str, Task] = {}
        self._blocked_until = 0.0
        self._told_unix_s = 0.0
        self._unreachable = 0
        """Attempts in a row that brought no answer."""

    @property
    def tasks(self) -> Sequence[Task]:
        return [*self._tasks.values(), self._trust]

    def configure(self, wanted: Sequence[Identity], materials: Mapping[str, Material], now: float) -> None:
        """``wanted`` comes in the order in which to ask for what is missing. An identity that is known keeps its date."""
        tasks: dict[str, Task] = {}
        for identity in wanted:
            known = self._tasks.get(identity.name)
            if known is None or known.spiffe_id != identity.spiffe_id:
                known = Task(identity.name, identity.spiffe_id, now)
                material = materials.get(identity.name)
                if material and material.spiffe_id == identity.spiffe_id:
                    known.expires_unix_s = material.expires_unix_s
                    known.due_unix_s = self._half_life(material.not_before_unix_s, material.expires_unix_s)
            tasks[identity.name] = known
        self._tasks = tasks

    def hurry(self, name: str, now: float) -> None:
        """Renews an identity at the next occasion."""
        self._tasks[name].due_unix_s = now

    def tell_time(self, now: float) -> None:
        """Call it often. When the clock is set back, what was to be done by the wrong one moves with it."""
        back_s = self._told_unix_s - now
        self._told_unix_s = now
        if back_s > 0:
            self._blocked_until -= back_s
            for task in self.tasks:
                task.due_unix_s -= back_s

    def next(self) -> tuple[float, Task]:
        """What to do next, and when. Of what is due together the first that was configured; trust comes last."""
        task = min(self.tasks, key=lambda task: task.due_unix_s)
        return max(task.due_unix_s, self._blocked_until), task

    def succeeded(self, task: Task, now: float, expires: float = 0.0) -> None:
        """``expires``: of the new certificate."""
        self.unblock()
        self._note_success(task, now)
        if task is not self._trust:
            task.expires_unix_s = expires
            # Ever shorter certificates, of a CA that ends itself, must not be asked for ever faster.
            task.due_unix_s = max(self._half_life(now, expires), now + self._retry_s)
            self._note_success(self._trust, now)
        self._trust.due_unix_s = now + self._spread(self._trust_interval_s)

    @staticmethod
    def _note_success(task: Task, now: float) -> None:
        task.renewed_unix_s, task.failures, task.error = now, 0, ""
        task.succeeded += 1

    def trust_changed(self, now: float) -> None:
        """Everything is renewed under the new root, so that the old one can go. What was fetched this moment is."""
        for task in self._tasks.values():
            if task.renewed_unix_s < now:
                task.due_unix_s = min(task.due_unix_s, now)

    def refused(self, task: Task, now: float, error: str) -> float:
        """The CA answered, and the answer is of no use. Only this task waits; gives for how long."""
        self.unblock()
        self._note_failure(task, error)
        wait_s = self._wait(task.failures, [task], now)
        task.due_unix_s = now + wait_s
        return wait_s

    def unreachable(self, task: Task, now: float, error: str) -> float:
        """No answer: everything waits; gives for how long."""
        self._unreachable += 1
        for one in self.tasks:
            if one is task or one.due_unix_s <= now:
                self._note_failure(one, error)
        wait_s = self._wait(self._unreachable, self.tasks, now)
        self._blocked_until = now + wait_s
        return wait_s

    def unblock(self) -> None:
        """The CA is there again, or there is something new to show to it."""
        self._unreachable, self._blocked_until = 0, 0.0

    @staticmethod
    def _note_failure(task: Task, error: str) -> None:
        task.failed += 1
        task.failures += 1
        task.error = error

    def _wait(self, failures: int, tasks: Sequence[Task], now: float) -> float:
        wait_s = self._retry_s * min(2 ** min(failures - 1, 16), MOST_RETRIES)
        left_s = min((task.expires_unix_s - now for task in tasks if task.expires_unix_s > now), default=float("inf"))
        return self._spread(min(wait_s, max(self._retry_s, left_s * LEFT_SHARE)))

    def _half_life(self, begins: float, expires: float) -> float:
        return begins + self._spread((expires - begins) * RENEW_AT)

    def _spread(self, seconds: float) -> float:
        return seconds * (1 + JITTER * (2 * self._random() - 1))


def check_answer(identity: Identity, private_key: bytes, certificates: bytes, bundle: bytes, crl: bytes, now: float) -> Material:
    """What the CA has answered for ``identity``, if it can be used. Raises IdentityError."""
    labels = Identity(
        identity.name, "the answer's certificate", "the new key", "the answer's bundle", "the answer's CRL", identity.spiffe_id
    )
    contents = {"the answer's certificate": certificates, "the new key": private_key}
    contents |= {"the answer's bundle": bundle, "the answer's CRL": crl}
    try:
        material = judge_identity(labels, contents, now)
    except UNREADABLE as error:
        raise IdentityError(f"the answer can't be read: {error}") from None
    if not material.chained:
        raise IdentityError("the answer's certificate: is signed by no CA of the answer's bundle")
    return material


def keep_trust(identity: Identity, bundle: bytes, crl: bytes) -> bool:
    """Writes what is trusted to the identity's files; gives whether the roots have changed. Raises CommandError.

    A list counts only when a root of the bundle stands behind it, and these are two files. Whoever reads between the renames, or
    after a crash there, finds the old list or the new one beside a bundle that has both roots.
    """
    bundle_path, crl_path = Path(identity.trust_bundle), Path(identity.crl)
    make_folder(bundle_path.parent)
    before = _read_kept(bundle_path)
    if before != bundle and before:
        write_file(bundle_path, bundle + before, 0o644)
    if _read_kept(crl_path) != crl:
        write_file(crl_path, crl, 0o644)
    if before != bundle:
        write_file(bundle_path, bundle, 0o644)
    return before != bundle and before != b""


def _read_kept(path: Path) -> bytes:
    """b"" when there is nothing yet. Raises CommandError."""
    try:
        with open_file(path) as stream:
            return stream.read()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise CommandError(f"{path}: can't be read: {error.strerror}") from None


def keep_credential(identity: Identity, private_key: bytes, certificates: bytes) -> None:
    """Key and certificate, which are never seen apart. Raises CommandError."""
    path = Path(identity.certificate)
    make_folder(path.parent)
    write_file(path, private_key + certificates, 0o600)


def enroll(authority: CertificateAuthority, spiffe_id: str, life: datetime.timedelta, folder: Path) -> Issued:
    """What a node begins with, at the places where it looks. Raises CommandError."""
    issued = authority.issue(spiffe_id, life)
    bundle, crl = authority.trust()
    make_folder(folder)
    write_file(folder / "bundle.pem", bundle, 0o644)
    write_file(folder / "crl.pem", crl, 0o644)
    write_file(folder / "node.pem", issued.private_key + issued.certificates, 0o600)
    return issued


def make_folder(folder: Path) -> None:
    """Raises CommandError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{folder}: can't be made: {error.strerror}; ca.folder names it") from None
