"""The parent of a data plane: starts it, keeps the redirect rules in step with it, and replaces it when it dies.

It holds no traffic and does little, so that it has little to die of: no engine, no event loop, and only what it must import. The data
plane is a child at the other end of a socket (``supervised.py``). It says there when it serves and which rules its configuration wants,
and learns by its end that the parent is gone; it is told there what became of the rules. Both speak lines of JSON. By a second socket
the parent gets the child's listening sockets, and keeps them for the next one, as nginx's master process does for its workers: while
somebody has them open the kernel accepts connections, and these wait.

=================== ==============================================================================================
the child           what happens
=================== ==============================================================================================
says ready          the rules are put in place; then they are looked at again and again, and repaired
reloads             the rules follow
dies                it is replaced: at once, then after a time that doubles; the rules stay or go (``redirect.on_crash``). Its
                    listening sockets go to the replacement, unless that is long in coming; when it as well ends before
                    it serves, connections are refused
does not come up    a replacement or successor that does not serve within a minute is killed
ends before it was  a configuration that can't be used: so does the parent, and has touched no rule
ever ready
is told to stop     nothing new is captured any more, live connections are; then it drains and the rest of the rules goes
hands over          to another child of ours (SIGUSR2, `l4mesh upgrade`): the rules are not touched. To a stranger: they are the
                    stranger's from now on, and the parent waits to be told to stop
=================== ==============================================================================================
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from l4mesh.capture.host import Listing, apply_rules, check_rules, remove_rules, require_tools
from l4mesh.capture.rules import FamilyRules, Rule, without_capture
from l4mesh.errors import CommandError
from l4mesh.runtime.channel import Channel, DescriptorsLost, Garbled, PeerGone, close_all
from l4mesh.runtime.descriptors import raise_descriptor_limit
from l4mesh.runtime.notify import Heartbeat, notify

CHANNEL = "L4MESH_SUPERVISOR"
"""Names the child's descriptors: of its ends of the two sockets, and of the listening sockets that it is to serve."""
OPTION = "--manage-redirect"
STEADY_S = 10.0
"""A child that has served for as long and dies is replaced at once again."""
BACK_OFF_S = 0.25
BACK_OFF_MOST_S = 30.0
RETRY_S = 1.0
"""After rules that could not be put in place or looked at."""
WAIT_MOST_S = 1.0
"""Connections wait for a child that is started by then."""
START_S = 60.0
"""From its start until a child serves that replaces one which did."""
LOOK_SHARE = 0.05
"""Of the time, at most, goes into looking at rules: others may have a hundred thousand of them, and all are listed."""
LISTED_DIFFERENCES = 20


def log(event: str, level: str = "info", **fields: object) -> None:
    """A line like those of the child, without its logging library."""
    line = json.dumps({**fields, "event": event, "level": level, "time": datetime.now(UTC).isoformat().replace("+00:00", "Z")})
    with contextlib.suppress(OSError):
        # A line is lost where it would have to wait: the child and the rules can't.
        if select.select([], [2], [], 0)[1]:
            os.write(2, f"{line}\n".encode())


def encode_rules(families: Sequence[FamilyRules]) -> list[dict[str, Any]]:
    return [asdict(family) for family in families]


def decode_rules(encoded: Sequence[Mapping[str, Any]]) -> list[FamilyRules]:
    return [
        FamilyRules(
            is_v6=family["is_v6"],
            rules=tuple(Rule(rule["table"], rule["chain"], tuple(rule["arguments"])) for rule in family["rules"]),
            return_mark=family["return_mark"],
            routes=family["routes"],
        )
        for family in encoded
    ]


def supervise() -> int:
    """Runs this very command without ``--manage-redirect`` as a child, until told to stop. Returns the exit code."""
    try:
        require_tools()
        return Supervisor([sys.executable, *(argument for argument in sys.orig_argv[1:] if argument != OPTION)]).run()
    except CommandError as error:
        print(f"l4mesh: {error}", file=sys.stderr)
        return 1


class RuleKeeper:
    """The rules of this network namespace, held to what they should be."""

    def __init__(self) -> None:
        self._wanted: list[FamilyRules] | None = None
        self._listed: dict[bool, Listing] = {}
        self._interval_s = 0.0
        self._look_s = 0.0
        """What the last look took."""
        self._worked = False
        self.in_place = False
        self.left = False
        """The last removal may have left some."""
        self.repairs = 0
        self.error = ""
        self.differences: list[str] = []
        """Of the last repair, the first ones."""
        self.due_at = float("inf")

    def keep(self, families: list[FamilyRules], interval_s: float) -> None:
        """Puts them in place unless they are, and looks at them as often. Raises CommandError where that has never worked."""
        self._interval_s = interval_s
        if families != self._wanted or not self.in_place:
            self._wanted = families
            self._apply()
        self._schedule()

    def look(self) -> None:
        """Repairs what differs."""
        if self._wanted is None:
            return
        began = time.monotonic()
        try:
            differences = check_rules(self._wanted, listed=self._listed) if self.in_place else []
        except CommandError as error:
            self._fail(error)
        else:
            self._look_s = time.monotonic() - began
            for difference in differences[:LISTED_DIFFERENCES]:
                log("redirect_differs", "warning", difference=difference)
            if differences or not self.in_place:
                # Told to the child in one line, which it reads up to 64 KiB.
                self.differences = differences[:LISTED_DIFFERENCES]
                self._apply()
                if differences and self.in_place:
                    self.repairs += 1
                    log("redirect_repaired", "warning", differences=len(differences))
        self._schedule()

    def _apply(self) -> None:
        assert self._wanted is not None
        try:
            self._listed = apply_rules(self._wanted)
        except CommandError as error:
            if not self._worked:
                raise
            self._fail(error)
            return
        self._worked = self.in_place = True
        self.error = ""
        log("redirect_applied", rules=sum(len(family.rules) for family in self._wanted))

    def _fail(self, error: CommandError) -> None:
        self.in_place = False
        if str(error) != self.error:
            log("redirect_failed", "error", error=str(error), retry_s=RETRY_S)
        self.error = str(error)

    def _schedule(self) -> None:
        wait_s = max(self._interval_s, self._look_s / LOOK_SHARE) if self._interval_s else float("inf")
        self.due_at = time.monotonic() + (wait_s if self.in_place else RETRY_S)

    def withdraw(self) -> None:
        """Captures nothing new any more. Connections that are there are left what they need."""
        if self._wanted is not None:
            self._wanted = without_capture(self._wanted)
            self._apply()
            self._schedule()

    def remove(self) -> None:
        """Leaves nothing. An error is said: there is nobody left to try again."""
        if self._wanted is None:
            return
        self.forget()
        try:
            remove_rules()
        except CommandError as error:
            self.left = True
            log("redirect_failed", "error", error=str(error), means="rules are left: l4mesh redirect remove")
        else:
            self.left = False
            log("redirect_removed")

    def forget(self) -> None:
        """They stay as they are, and are somebody else's."""
        self._wanted = None
        self.in_place = False
        self.due_at = float("inf")

    def status(self) -> dict[str, Any]:
        return {"in_place": self.in_place, "repairs": self.repairs, "differences": self.differences, "error": self.error}


@dataclass(slots=True, eq=False)
class Child:
    process: subprocess.Popen[bytes]
    pidfd: int
    channel: socket.socket
    keeper: Channel
    start_by: float
    ready_at: float | None = None
    received: bytes = b""
    hands_over: bool = False
    kept: list[int] = field(default_factory=list)
    """Listening sockets, for the next one."""
    kept_of: int = 0
    """How many there are: with some of them missing nobody would know which. -1: with some lost on the way."""

    def tell(self, say: str, **fields: object) -> None:
        """Unless it is gone, or has not read what it was told before: nothing that it is told waits."""
        with contextlib.suppress(OSError):
            self.channel.send(json.dumps({"say": say, **fields}).encode() + b"\n", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def let_go(self) -> None:
        """Of the listening sockets: else connections that nobody accepts would wait there."""
        close_all(self.kept)
        self.kept = []


class Supervisor:
    """``command``: the child's."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._rules = RuleKeeper()
        self._poll = select.poll()
        self._readers: dict[int, Callable[[], None]] = {}
        self._child: Child | None = None
        self._successor: Child | None = None
        self._leaving: list[Child] = []
        self._was_ready = False
        self._on_crash = "closed"
        self._kept: list[int] = []
        """Listening sockets for the child that is started next."""
        self._restarts = 0
        self._failures = 0
        self._restart_at = float("inf")
        self._down_since = 0.0
        """When the one that served died; 0: it serves, or none ever did."""
        self._stopping = False
        self._code: int | None = None
        self._heartbeat = Heartbeat()

    def run(self) -> int:
        """Until told to stop. Raises CommandError when the rules can't be put in place the first time."""
        raise_descriptor_limit()
        signals, wake = socket.socketpair()
        for end in (signals, wake):
            end.setblocking(False)
        with signals, wake:
            signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
                signal.signal(number, lambda *_: None)
            self._watch(signals.fileno(), lambda: self._take_signals(signals))
            self._child = self._start()
            if self._child is None:
                return 1
            try:
                while self._code is None:
                    self._turn()
            except BaseException:
                self._abandon()
                raise
        return self._code

    def _abandon(self) -> None:
        """What can't go on ends what it has started. Rules stay as they are."""
        for child in self._children():
            child.signal(signal.SIGTERM)
        for child in self._children():
            child.process.wait()

    def _children(self) -> list[Child]:
        return [child for child in (self._child, self._successor, *self._leaving) if child]

    def _turn(self) -> None:
        due_at = min(self._restart_at, self._rules.due_at, self._heartbeat.due_at, *(child.start_by for child in self._children()))
        wait_ms = None if due_at == float("inf") else max(0.0, (due_at - time.monotonic()) * 1000 + 1)
        for fd, _ in self._poll.poll(wait_ms):
            if fd in self._readers:
                self._readers[fd]()
        self._heartbeat.beat()
        now = time.monotonic()
        if now >= self._restart_at:
            self._child = self._start()
            self._restart_at = float("inf") if self._child else now + RETRY_S
        for child in self._children():
            if now >= child.start_by:
                log("data_plane_hangs", "error", pid=child.process.pid, means=f"it does not serve after {START_S:g} s: killed")
                child.start_by = float("inf")
                child.signal(signal.SIGKILL)
        if now >= self._rules.due_at:
            self._rules.look()
            self._tell_status()

    def _watch(self, fd: int, call: Callable[[], None]) -> None:
        self._readers[fd] = call
        self._poll.register(fd, select.POLLIN)

    def _forget(self, fd: int) -> None:
        if self._readers.pop(fd, None):
            self._poll.unregister(fd)

    # -- children --------------------------------------------------------------------------------------------------------

    def _start(self) -> Child | None:
        """None: the machine has no process or descriptor left for it, or its program is being replaced; that was said."""
        try:
            child = self._spawn()
        except OSError as error:
            log("data_plane_not_started", "error", error=os.strerror(error.errno or 0))
            return None
        finally:
            # The child has them; where there is none, connections are refused.
            self._let_go()
        self._watch(child.channel.fileno(), lambda: self._read(child))
        self._watch(child.keeper.fileno(), lambda: self._keep(child))
        self._watch(child.pidfd, lambda: self._bury(child))
        return child

    def _spawn(self) -> Child:
        ours, theirs = socket.socketpair()
        keeper, giver = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {name: value for name, value in os.environ.items() if name not in ("NOTIFY_SOCKET", "WATCHDOG_USEC")}
        with theirs, giver:
            given = (theirs.fileno(), giver.fileno(), *self._kept)
            environment[CHANNEL] = ",".join(map(str, given))
            # A process group of its own: Ctrl-C is for us, who take things down in order.
            process = subprocess.Popen(self._command, env=environment, pass_fds=given, process_group=0)
        ours.setblocking(False)
        start_by = time.monotonic() + START_S if self._was_ready else float("inf")
        try:
            return Child(process, os.pidfd_open(process.pid), ours, Channel(keeper), start_by)
        except OSError:
            process.kill()
            process.wait()
            raise

    def _let_go(self) -> None:
        close_all(self._kept)
        self._kept = []

    def _keep(self, child: Child) -> None:
        """The listening sockets that it has now, in place of those before."""
        try:
            while True:
                message = child.keeper.receive(0.0, "keep", "keep_more")
                if message.body["say"] == "keep":
                    child.let_go()
                    child.kept_of = message.body["of"]
                child.kept += message.descriptors
                if self._stopping or child.hands_over or child in self._leaving:
                    child.let_go()
        except TimeoutError:
            return
        except (DescriptorsLost, Garbled) as error:
            child.let_go()
            child.kept_of = -1
            log("sockets_not_kept", "warning", error=str(error), means="connections are refused while this data plane is replaced")
        except PeerGone:
            self._forget(child.keeper.fileno())

    def _read(self, child: Child) -> None:
        """All that it has said so far."""
        with contextlib.suppress(OSError):
            while data := child.channel.recv(1 << 20):
                child.received += data
            self._forget(child.channel.fileno())
        *lines, child.received = child.received.split(b"\n")
        for line in lines:
            self._hear(child, json.loads(line))

    def _hear(self, child: Child, message: dict[str, Any]) -> None:
        say = message["say"]
        if say in ("ready", "rules"):
            if say == "ready":
                self._serves(child)
            if child is self._child and not self._stopping and not child.hands_over:
                self._on_crash = message["on_crash"]
                self._rules.keep(decode_rules(message["rules"]), message["check_interval_ms"] / 1000)
                if say == "ready":
                    notify(READY=1)
                self._tell_status()
        elif say == "upgrade":
            self._upgrade()
        elif say == "abandon":
            if self._successor and child is self._child:
                self._successor.signal(signal.SIGKILL)
        elif say == "hands_over":
            child.hands_over = True
            child.let_go()
            if child is self._child and self._successor:
                self._promote()
            elif child is self._child and not self._stopping:
                self._rules.forget()
                log("taken_over", "warning", pid=child.process.pid, means="by a process that is not ours: the rules are its own now")
        elif say == "drains" and child is self._child and not child.hands_over and not self._successor and not self._stopping:
            # It has been told so by another, `l4mesh drain` for instance.
            self._stop(signal.SIGTERM, told=child)

    def _serves(self, child: Child) -> None:
        child.ready_at, child.start_by = time.monotonic(), float("inf")
        if child is self._successor:
            self._promote()
        if self._down_since:
            log("replaced", pid=child.process.pid, down_s=round(child.ready_at - self._down_since, 3))
            self._down_since = 0.0
        self._was_ready = True

    def _promote(self) -> None:
        """The successor serves, or is about to: the one before only drains."""
        assert self._child
        assert self._successor
        log("successor_serves", old=self._child.process.pid, new=self._successor.process.pid)
        self._child.let_go()
        self._leaving.append(self._child)
        self._child, self._successor = self._successor, None

    def _bury(self, child: Child) -> None:
        code = child.process.poll()
        if code is None:
            return
        self._read(child)
        self._keep(child)
        for fd in (child.channel.fileno(), child.keeper.fileno(), child.pidfd):
            self._forget(fd)
        child.channel.close()
        child.keeper.close()
        os.close(child.pidfd)
        if child in self._leaving:
            self._leaving.remove(child)
        elif child is self._successor:
            self._successor = None
            log("upgrade_failed", "error", ended=_shown(code), means="the one before goes on")
            if self._child:
                self._child.tell("successor_ended", code=code)
        else:
            self._lose(child, code)
        child.let_go()
        if self._stopping and not self._children():
            self._rules.remove()
            log("supervisor_stopped")
            self._code = 0 if not self._rules.left and code in (0, -signal.SIGTERM, -signal.SIGINT) else 1

    def _lose(self, child: Child, code: int) -> None:
        """The one that served, or was to serve, is gone."""
        self._child, self._successor = self._successor, None
        now = time.monotonic()
        self._down_since = self._down_since or now
        if self._stopping or child.hands_over:
            return
        if not self._was_ready and code == 1:
            # It has said why.
            self._code = 1
            return
        self._restarts += 1
        if child.ready_at and now - child.ready_at >= STEADY_S:
            self._failures = 0
        wait_s = min(BACK_OFF_S * 2 ** (self._failures - 1), BACK_OFF_MOST_S) * random.uniform(0.5, 1) if self._failures else 0.0
        self._failures += 1
        # A successor that was on its way comes at once.
        self._restart_at = float("inf") if self._child else now + wait_s
        if child.ready_at and not self._child and wait_s <= WAIT_MOST_S and len(child.kept) == child.kept_of:
            self._kept, child.kept = child.kept, []
        log(
            "data_plane_died", "error", pid=child.process.pid, ended=_shown(code), restart_s=round(wait_s, 3), on_crash=self._on_crash,
            new_connections="wait" if self._kept else "refused",
        )  # fmt: skip
        if self._on_crash == "open":
            self._rules.remove()

    def _tell_status(self) -> None:
        if self._child:
            self._child.tell("status", restarts=self._restarts, redirect=self._rules.status())

    def _upgrade(self) -> None:
        """A second child, which takes over from the first."""
        if self._successor or not self._child or self._child.hands_over or self._stopping:
            log("upgrade_refused", "warning", means="there is one under way, or nothing to upgrade")
            return
        self._successor = self._start()
        if self._successor is None:
            self._child.tell("successor_ended", code=1)
            return
        log("upgrade_begins", old=self._child.process.pid, new=self._successor.process.pid)

    # -- signals ---------------------------------------------------------------------------------------------------------

    def _take_signals(self, signals: socket.socket) -> None:
        for number in signals.recv(4096):
            if number == signal.SIGHUP:
                for child in self._children():
                    # One that has just been started would die of it, and reads its files anyway.
                    if child.ready_at:
                        child.signal(number)
            elif number == signal.SIGUSR2:
                self._upgrade()
            elif number in (signal.SIGTERM, signal.SIGINT):
                self._stop(number)

    def _stop(self, number: int, told: Child | None = None) -> None:
        """First nothing new comes to the child, then it drains: SIGTERM. Or it ends at once: SIGINT, or a second one of either."""
        if not self._stopping:
            self._stopping = True
            self._restart_at = float("inf")
            self._let_go()
            for child in self._children():
                child.let_go()
            notify(STOPPING=1)
            if number == signal.SIGINT or not self._child:
                self._rules.remove()
            else:
                self._rules.withdraw()
        for child in self._children():
            if child is not told:
                child.signal(number)
        if not self._children():
            self._code = int(self._rules.left)


def _shown(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
