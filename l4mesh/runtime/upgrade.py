"""One process takes over from another on the same host, and nobody notices: both ends of it.

The new process finds the running one at a unix socket (``upgrade.socket``) and gets its listening sockets, so that what waits in
their queues is lost to neither. It loads everything and accepts before the running one stops to. Then live plaintext connections
cross over, and the counters; TLS, dials under way and resets end where they are.

::

    new                                        running
    takeover (protocol, size of a connection) ─►
                                             ◄─ offer (listening sockets, verdicts on endpoints), sockets … or refused (why)
    ready: it accepts                         ─►  stops accepting
                                             ◄─ connections (a batch), again and again
    taken: they go on here, or not_taken      ─►  forgets them, or goes on with them
                                             ◄─ yours (counters): the admin server is free
    serving                                   ─►  closes the listening sockets, drains
                                             ◄─ counters, connections …, until the running one is gone

Whatever happens to the new process before ``serving``, the running one accepts again and goes on with what it still has. A batch is
taken when the new process could say so: it goes on with it only then, and the running one, should it wait no longer, first makes
sure that this can't be said any more.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, get_type_hints

import structlog

from l4mesh import __version__
from l4mesh.datapath import CARRIED_BYTES, Datapath, Traveller
from l4mesh.errors import CommandError, L4meshError
from l4mesh.model import SocketAddress
from l4mesh.policy import outlier
from l4mesh.runtime import health
from l4mesh.runtime.channel import DESCRIPTORS_MAX, Channel, DescriptorsLost, Garbled, Message, PeerGone, close_all
from l4mesh.runtime.listeners import Place
from l4mesh.runtime.notify import notify
from l4mesh.totals import Count, Totals, decode, dict_of

PROTOCOL = 1
"""Of the messages, and of ``carried_t``: processes of different numbers don't take over from each other."""
GREETING_S = 5.0
START_S = 60.0
"""From when the new process has the sockets until it accepts."""
ANSWER_S = 10.0
SILENCE_S = 30.0
"""The new process waits no longer for the running one."""
PASSES = 3
"""Over the live connections, before the rest is left to the drain: dials that were under way are done by then."""
REPORT_EVERY_S = 0.25
REPORT_SHARE = 50
CALLERS = 8
ACCEPT_AGAIN_S = 0.5

log = structlog.get_logger()

T = TypeVar("T")


def start_again() -> Successor:
    """A process like this one, as its child. Raises CommandError."""
    if is_container():
        raise CommandError("the container ends with the process that runs in it: start another container beside it")
    try:
        return subprocess.Popen([sys.executable, *sys.orig_argv[1:]])
    except OSError as error:
        raise CommandError(f"can't start the new process: {error}") from error


def is_container() -> bool:
    """Whether this process and its container end together."""
    return os.getpid() == 1 or "KUBERNETES_SERVICE_HOST" in os.environ


# -- the running process -----------------------------------------------------------------------------------------------------


class Successor(Protocol):
    """A new process of the same command line."""

    def poll(self) -> int | None:
        """Its exit code; None: it has not ended."""
        ...

    def kill(self) -> None: ...


class Running(Protocol):
    """What the upgrade asks of the process that is replaced. What is a coroutine is called on the loop."""

    @property
    def datapath(self) -> Datapath: ...

    def start_successor(self) -> Successor:
        """Raises CommandError."""
        ...

    async def hold(self) -> None:
        """Keeps the configuration, and with it the listening sockets, as they are."""
        ...

    def sockets(self) -> list[tuple[Place, list[socket.socket]]]: ...

    async def verdicts(self) -> Verdicts: ...

    def admin(self) -> tuple[str, socket.socket | None]:
        """Address of the admin server, and its listening socket."""
        ...

    async def release(self) -> None:
        """Stops to answer admin requests, without closing the socket."""
        ...

    def counted(self) -> Sequence[Count]:
        """By the control loop."""
        ...

    async def resume(self) -> None:
        """Takes ``hold`` and ``release`` back: this process goes on."""
        ...

    def replaced(self) -> None:
        """Another process serves: drain and end."""
        ...


@dataclass(frozen=True, slots=True)
class Verdicts:
    """On endpoints, by cluster: an upgrade sends nobody to one that is known to be bad."""

    health: Mapping[str, Sequence[health.Past]]
    ejections: Mapping[str, Sequence[outlier.Past]]

    def encode(self) -> dict[str, Any]:
        return {"health": self.health, "ejections": self.ejections}

    @classmethod
    def decode(cls, data: object) -> Verdicts:
        """Of a version that tells none: none. Raises TypeError or ValueError."""
        told = {} if data is None else dict_of(data)
        return cls(_decode_pasts(health.Past, told.get("health")), _decode_pasts(outlier.Past, told.get("ejections")))


P = TypeVar("P", health.Past, outlier.Past)


def _decode_pasts(kind: type[P], data: object) -> dict[str, list[P]]:
    hints = get_type_hints(kind).values()
    return {name: [kind(*map(decode, hints, row)) for row in rows] for name, rows in ({} if data is None else dict_of(data)).items()}


@dataclass(frozen=True, slots=True)
class Account:
    """How an upgrade went. ``left``: live connections that stay until they end."""

    old: int
    new: int
    handed_over: int
    left: int
    seconds: float


class UpgradeServer:
    """Waits for the process that takes over from this one, or starts it when asked to."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self._loop = asyncio.get_running_loop()
        self._listening: socket.socket | None = None
        self._pause: asyncio.TimerHandle | None = None
        self._path = ""
        self._lock = threading.Lock()
        self._outcome: concurrent.futures.Future[Account] | None = None
        self._awaited = False
        self._callers: set[Channel] = set()
        self._threads = concurrent.futures.ThreadPoolExecutor(CALLERS, "l4mesh-upgrade")
        self._successor: Channel | None = None
        self._handed_over = 0
        self._stopping = threading.Event()
        self._quiet = threading.Event()

    def listen(self, path: str, inherited: socket.socket | None = None) -> None:
        """Listens at ``path``. Raises CommandError. ``inherited``: the socket of the process before."""
        self._path = path
        self._listening = inherited or _listen(path)

    def answer(self) -> None:
        """Takes what comes."""
        assert self._listening is not None
        self._listening.setblocking(False)
        self._loop.add_reader(self._listening, self._accept)

    def _accept(self) -> None:
        assert self._listening is not None
        try:
            connected, _ = self._listening.accept()
        except BlockingIOError:
            return
        except OSError:
            # No descriptor is left for it: it waits, and the loop does not spin meanwhile because the socket stays ready.
            self._loop.remove_reader(self._listening)
            self._pause = self._loop.call_later(ACCEPT_AGAIN_S, self.answer)
            return
        channel = Channel(connected)
        pid, uid = channel.peer
        if uid not in (0, os.geteuid()) or len(self._callers) >= CALLERS:
            log.warning("upgrade_caller_refused", pid=pid, uid=uid)
            channel.close()
            return
        self._callers.add(channel)
        self._threads.submit(self._serve, channel, pid)

    def _serve(self, channel: Channel, pid: int) -> None:
        kept = False
        try:
            greeting = channel.receive(GREETING_S, "takeover", "replace").body
            if greeting.get("protocol") != PROTOCOL or greeting.get("carried") != CARRIED_BYTES:
                theirs = f"{greeting.get('version')} (protocol {greeting.get('protocol')})"
                channel.send(
                    "refused", {"why": f"{theirs} can't take over from {__version__} (protocol {PROTOCOL}): stop this one first"}
                )
            elif greeting["say"] == "replace":
                self._replace(channel)
            else:
                kept = self._yield(channel, pid)
        except (L4meshError, OSError) as error:
            log.warning("upgrade_caller_failed", pid=pid, error=str(error))
        except Exception:
            log.exception("upgrade_caller_failed", pid=pid)
        finally:
            self._callers.discard(channel)
            if not kept:
                channel.close()

    def _replace(self, channel: Channel) -> None:
        """Starts the successor, and tells the caller how it went."""
        outcome = self._begin(channel, awaited=True)
        if outcome is None:
            return
        try:
            successor = self._running.start_successor()
            try:
                account = self._await(successor, outcome)
            except CommandError:
                successor.kill()
                raise
            channel.send("done", {name: getattr(account, name) for name in Account.__slots__})
        except (CommandError, OSError) as error:
            log.error("upgrade_failed", error=str(error), means="this process goes on")
            channel.send("refused", {"why": str(error)})
        finally:
            self._end(outcome)

    def _await(self, successor: Successor, outcome: concurrent.futures.Future[Account]) -> Account:
        """Raises CommandError with why it failed. Once the new process has begun to take over, that decides it."""
        deadline = time.monotonic() + START_S
        while not concurrent.futures.wait([outcome], timeout=0.02).done:
            code = successor.poll()
            if code is not None and self._awaited:
                raise CommandError(f"the new process ended with {code} before it took over; its log says why")
            if self._awaited and self._stopping.is_set():
                raise CommandError("the running process is told to stop")
            if self._awaited and time.monotonic() > deadline:
                raise CommandError(f"the new process has not begun to take over within {START_S:g} s")
        return outcome.result()

    def _begin(self, channel: Channel, awaited: bool) -> concurrent.futures.Future[Account] | None:
        """The outcome of the one upgrade that may be under way; None, and told: there is one already."""
        with self._lock:
            if self._outcome is None:
                self._outcome = concurrent.futures.Future()
                self._awaited = awaited
                return self._outcome
            if self._awaited and not awaited:
                self._awaited = False
                return self._outcome
        channel.send("refused", {"why": f"an upgrade of process {os.getpid()} is under way already"})
        return None

    def _end(self, outcome: concurrent.futures.Future[Account]) -> None:
        with self._lock:
            if self._outcome is outcome and self._successor is None:
                self._outcome = None

    def _yield(self, channel: Channel, pid: int) -> bool:
        """Hands over to the process at the other end; true when it serves."""
        asked_for = self._awaited
        outcome = self._begin(channel, awaited=False)
        if outcome is None:
            return False
        try:
            account = self._hand_over(channel, pid)
        except Exception as error:
            # Or the other process would take the end of the conversation for the end of this one.
            with contextlib.suppress(PeerGone):
                channel.send("failed", {"why": str(error)})
            if not asked_for:
                self._end(outcome)
            outcome.set_exception(CommandError(str(error)))
            log.error("upgrade_failed", pid=pid, error=str(error), means="this process goes on")
            return False
        self._successor = channel
        log.info("upgraded", **{name: getattr(account, name) for name in Account.__slots__})
        outcome.set_result(account)
        if pid:
            # 0: it is in another container.
            notify(MAINPID=pid)
        self._loop.call_soon_threadsafe(self._running.replaced)
        return True

    def _hand_over(self, channel: Channel, pid: int) -> Account:
        """Raises what ended it; then this process serves as before."""
        running = self._running
        try:
            # Even when it is not done in time, it has begun.
            self._on_loop(running.hold)
            self._offer(channel)
            answer = channel.receive(START_S, "ready", "failed")
            if answer.body["say"] == "failed":
                raise CommandError(str(answer.body.get("why"))[:1000])
            began = time.monotonic()
            self._handed_over = 0
            running.datapath.leave_accepting(True)
            # Before the live connections, so that nobody sees them here as ended who later sees them there as live.
            self._on_loop(running.release)
            for _ in range(PASSES):
                self._hand_over_live(channel)
            self._report(channel, "yours")
            _hear(channel, "serving")
        except BaseException:
            running.datapath.leave_accepting(False)
            self._on_loop(running.resume)
            raise
        seconds = round(time.monotonic() - began, 4)
        return Account(os.getpid(), pid, self._handed_over, running.datapath.active, seconds)

    def _offer(self, channel: Channel) -> None:
        assert self._listening is not None
        sockets = self._running.sockets()
        address, admin = self._running.admin()
        descriptors = [self._listening.fileno(), *([admin.fileno()] if admin else [])]
        descriptors += [listening.fileno() for _, of_place in sockets for listening in of_place]
        places = [[place.bind.host, place.bind.port, place.transparent, place.owner, len(of_place)] for place, of_place in sockets]
        offer = {
            "pid": os.getpid(),
            "version": __version__,
            "admin": address if admin else "",
            "places": places,
            "sockets": len(descriptors),
            "verdicts": self._on_loop(self._running.verdicts).encode(),
        }
        channel.send("offer", offer, descriptors=descriptors[:DESCRIPTORS_MAX])
        for first in range(DESCRIPTORS_MAX, len(descriptors), DESCRIPTORS_MAX):
            channel.send("sockets", descriptors=descriptors[first : first + DESCRIPTORS_MAX])

    def _hand_over_live(self, channel: Channel) -> None:
        self._handed_over += self._running.datapath.hand_over(lambda worker, travellers: _deliver(channel, worker, travellers))

    def _report(self, channel: Channel, say: str) -> None:
        counts = [count.encode() for count in self._running.counted()]
        channel.send(say, {"totals": self._running.datapath.totals().encode(), "counts": counts})

    def _on_loop(self, work: Callable[[], Awaitable[T]]) -> T:
        async def run() -> T:
            return await work()

        try:
            return asyncio.run_coroutine_threadsafe(run(), self._loop).result(ANSWER_S)
        except TimeoutError:
            raise CommandError(f"the running process has not come to it within {ANSWER_S:g} s; a reload may be under way") from None

    def report(self) -> None:
        """After ``replaced``, until ``report_no_more``: tells the counters, and hands over what can be by now. Blocks."""
        while self._successor is not None and not self._quiet.is_set():
            began = time.monotonic()
            try:
                self._hand_over_live(self._successor)
                self._report(self._successor, "counters")
            except (L4meshError, OSError) as error:
                log.warning("upgrade_successor_lost", error=str(error), means="what is left ends here")
                self._forget_successor()
            # The counters of very many endpoints take their time, there as well.
            self._quiet.wait(min(max(REPORT_EVERY_S, REPORT_SHARE * (time.monotonic() - began)), ANSWER_S))

    def report_no_more(self) -> None:
        self._quiet.set()

    def finish(self) -> None:
        """After the data path has stopped: reports for the last time."""
        if self._successor is not None:
            with contextlib.suppress(PeerGone):
                self._report(self._successor, "counters")
            self._forget_successor()

    def _forget_successor(self) -> None:
        if self._successor is not None:
            self._successor.close()
            self._successor = None

    async def stop(self, remove_path: bool = True) -> None:
        """Listens no more, and breaks off what is under way: then this process has what it had. The successor stays."""
        if self._listening is None:
            return
        self._loop.remove_reader(self._listening)
        if self._pause:
            self._pause.cancel()
        if self._successor is None:
            self._stopping.set()
            for caller in list(self._callers):
                caller.hang_up()
        await asyncio.to_thread(self._threads.shutdown)
        self._listening.close()
        self._listening = None
        if self._successor is None and remove_path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)


def _deliver(channel: Channel, worker: int, travellers: list[Traveller]) -> bool:
    """Whether the other process has them now. Raises PeerGone when it has not and there is none any more."""
    listed = [[len(state), len(fds), listener, cluster, endpoint] for state, fds, listener, cluster, endpoint in travellers]
    descriptors = [fd for _, fds, *_ in travellers for fd in fds]
    channel.send("connections", {"worker": worker, "of": listed}, b"".join(state for state, *_ in travellers), descriptors)
    return _hear(channel, "taken", "not_taken") == "taken"


def _hear(channel: Channel, *expected: str) -> str:
    """The answer that decides who has something. Raises PeerGone when there is none and, for certain, will be none."""
    try:
        return str(channel.receive(ANSWER_S, *expected).body["say"])
    except (TimeoutError, Garbled, DescriptorsLost) as error:
        answer = channel.last_words(*expected)
        if answer is None:
            raise PeerGone(f"the new process does not answer: {error}") from error
        return str(answer.body["say"])


def _listen(path: str) -> socket.socket:
    """Raises CommandError."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = os.umask(0o177)
    try:
        # Nobody answers there: `Takeover.find` has looked.
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                os.unlink(path)
        listening.bind(path)
        listening.listen(CALLERS)
    except OSError as error:
        listening.close()
        raise CommandError(f"upgrade: can't listen on {path}: {error.strerror}; set upgrade.socket to another path, or off") from error
    finally:
        os.umask(before)
    return listening


# -- the new process ---------------------------------------------------------------------------------------------------------


class Takeover:
    """The running process that this one takes over from. Owner of the sockets that came from it, until they are asked for."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._old_pid = 0
        self._admin = ""
        self._admin_socket: socket.socket | None = None
        self._upgrade_socket: socket.socket | None = None
        self._listening: dict[Place, list[socket.socket]] = {}
        self.verdicts = Verdicts({}, {})
        self.counts: Sequence[Count] = ()
        """What the control loop of the process before has counted, as far as it has told."""
        self.is_over = False
        """The process before is gone."""

    @classmethod
    def find(cls, path: str) -> Takeover | None:
        """None: no process runs there. Raises CommandError when one does and can't be taken over from."""
        connected = _connect(path)
        if connected is None:
            return None
        takeover = cls(Channel(connected))
        try:
            _, uid = takeover._channel.peer
            if uid not in (0, os.geteuid()):
                raise CommandError(f"upgrade: user {uid} listens on {path}: not one to take sockets from")
            takeover._take_offer()
        except (PeerGone, Garbled, DescriptorsLost, TimeoutError) as error:
            takeover.close()
            raise CommandError(f"upgrade: a process answers on {path} but hands nothing over: {error}") from error
        except BaseException:
            takeover.close()
            raise
        return takeover

    def _take_offer(self) -> None:
        self._channel.send("takeover", _greeting())
        message = self._channel.receive(SILENCE_S, "offer", "refused", "failed")
        if message.body["say"] != "offer":
            raise CommandError(f"upgrade: {message.body.get('why')}")
        sockets = [socket.socket(fileno=fd) for fd in message.descriptors]
        try:
            self._old_pid = int(message.body["pid"])
            while len(sockets) < int(message.body["sockets"]):
                more = self._channel.receive(GREETING_S, "sockets").descriptors
                if not more:
                    raise Garbled("sockets are missing")
                sockets += [socket.socket(fileno=fd) for fd in more]
            left = iter(sockets)
            self._upgrade_socket = next(left)
            self._admin = str(message.body["admin"])
            self.verdicts = Verdicts.decode(message.body.get("verdicts"))
            if self._admin:
                self._admin_socket = next(left)
            for host, port, transparent, owner, count in message.body["places"]:
                place = Place(SocketAddress(str(host), int(port)), bool(transparent), str(owner))
                self._listening[place] = [next(left) for _ in range(int(count))]
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            _close_sockets(sockets)
            raise Garbled(f"the offer makes no sense: {error!r}") from error
        except BaseException:
            _close_sockets(sockets)
            raise
        log.info("upgrade_begins", old=self._old_pid, version=message.body.get("version"), sockets=len(sockets))

    def take_listening(self) -> Mapping[Place, list[socket.socket]]:
        taken, self._listening = self._listening, {}
        return taken

    def take_admin(self, address: str) -> socket.socket | None:
        """The listening socket of the admin server, where its address stays the same."""
        if self._admin != address or self._admin_socket is None:
            return None
        taken, self._admin_socket = self._admin_socket, None
        return taken

    def drop_unused(self) -> None:
        """Closes the admin socket of the process before where this one has another, or none."""
        if self._admin_socket is not None:
            if self._admin_socket.family == socket.AF_UNIX:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._admin_socket.getsockname())
            self._admin_socket.close()
            self._admin_socket = None

    def take_upgrade(self) -> socket.socket | None:
        taken, self._upgrade_socket = self._upgrade_socket, None
        return taken

    def complete(self, datapath: Datapath) -> None:
        """This process accepts: takes over live connections and counters, until the running one has let go of the admin server.
        Blocks. Raises CommandError when it goes on itself; when it is gone, this one goes on with what it has."""
        try:
            self._channel.send("ready")
            while not self._step(datapath, SILENCE_S, "connections", "yours", "failed"):
                pass
        except PeerGone as error:
            self._go_on_alone(error)
            datapath.inherit_no_more()
        except (Garbled, TimeoutError) as error:
            raise CommandError(f"upgrade: process {self._old_pid}: {error}") from error

    def serve(self) -> None:
        """Tells the process before that this one serves. Raises CommandError when that one has gone back to work meanwhile."""
        if self.is_over:
            return
        try:
            self._channel.send("serving")
        except PeerGone as error:
            self._go_on_alone(error)

    def _go_on_alone(self, error: PeerGone) -> None:
        """Raises CommandError when the process before is not gone but goes on itself."""
        if said := self._channel.last_words("failed"):
            raise CommandError(f"upgrade: {said.body.get('why')}") from error
        log.warning("upgrade_cut_short", old=self._old_pid, means="the process before is gone; this one goes on with what it got")
        self.is_over = True

    def follow(self, datapath: Datapath) -> None:
        """Takes what the process before still has, connections and counters, until it is gone. Blocks."""
        try:
            while not self.is_over:
                self._step(datapath, SILENCE_S, "connections", "counters")
        except PeerGone:
            pass
        except (L4meshError, OSError) as error:
            log.warning("upgrade_predecessor_lost", old=self._old_pid, error=str(error))
        finally:
            datapath.inherit_no_more()
            self.is_over = True
            self._channel.close()
            log.info("upgrade_ends", old=self._old_pid)

    def _step(self, datapath: Datapath, timeout_s: float, *expected: str) -> bool:
        """One message; true for "yours"."""
        try:
            message = self._channel.receive(timeout_s, *expected)
        except DescriptorsLost:
            # Some of them have come and are closed again, which ends nothing: the other process has them.
            self._channel.send("not_taken")
            return False
        say = message.body["say"]
        if say == "connections":
            self._take_in(datapath, message)
        elif say == "failed":
            raise CommandError(f"upgrade: {message.body.get('why')}")
        else:
            try:
                datapath.inherit(Totals.decode(message.body.get("totals")))
                self.counts = [Count.decode(count) for count in message.body.get("counts", ())]
            except (TypeError, ValueError) as error:
                raise Garbled(str(error)) from error
        return bool(say == "yours")

    def _take_in(self, datapath: Datapath, message: Message) -> None:
        descriptors = message.descriptors
        try:
            worker, travellers = _read_travellers(message)
            if datapath.take_in(worker, travellers, lambda: self._channel.send("taken")):
                descriptors = []
                return
        except (ValueError, TypeError, KeyError, MemoryError) as error:
            log.warning("upgrade_connections_refused", error=str(error))
        except PeerGone:
            # Settled by the data path, which has closed them.
            descriptors = []
            raise
        finally:
            close_all(descriptors)
        self._channel.send("not_taken")

    def fail(self, why: str) -> None:
        """Tells the running process that this one gives up."""
        with contextlib.suppress(PeerGone):
            self._channel.send("failed", {"why": why})

    def hang_up(self) -> None:
        """From any thread: makes the others return."""
        self._channel.hang_up()

    def close(self) -> None:
        self._channel.close()
        _close_sockets([listening for of_place in self._listening.values() for listening in of_place])
        for listening in (self._admin_socket, self._upgrade_socket):
            if listening is not None:
                listening.close()


def _greeting() -> dict[str, Any]:
    return {"protocol": PROTOCOL, "carried": CARRIED_BYTES, "version": __version__}


def _read_travellers(message: Message) -> tuple[int, list[Traveller]]:
    """Raises ValueError, TypeError or KeyError."""
    travellers: list[Traveller] = []
    at, next_fd = 0, 0
    for length, count, listener, cluster, endpoint in message.body["of"]:
        state, fds = message.data[at : at + length], message.descriptors[next_fd : next_fd + count]
        travellers.append((state, fds, str(listener), str(cluster), str(endpoint)))
        at, next_fd = at + length, next_fd + count
    if (at, next_fd) != (len(message.data), len(message.descriptors)):
        raise ValueError("bytes or descriptors are missing")
    return int(message.body["worker"]), travellers


def _connect(path: str) -> socket.socket | None:
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connected.settimeout(GREETING_S)
    try:
        connected.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):
        connected.close()
        return None
    except OSError as error:
        connected.close()
        raise CommandError(f"upgrade: can't reach {path}: {error.strerror or error}") from error
    return connected


def _close_sockets(sockets: list[socket.socket]) -> None:
    for one in sockets:
        one.close()


def request_upgrade(path: str) -> Account:
    """Makes the process that listens at ``path`` start another one that takes over from it. Raises CommandError with why not."""
    connected = _connect(path)
    if connected is None:
        raise CommandError(f"no process runs at {path}: start it with l4mesh run")
    channel = Channel(connected)
    try:
        channel.send("replace", _greeting())
        answer = channel.receive(START_S + 2 * ANSWER_S, "done", "refused").body
    except (L4meshError, TimeoutError) as error:
        raise CommandError(f"the running process does not say how the upgrade went ({error}): its log does") from error
    finally:
        channel.close()
    if answer["say"] == "refused":
        raise CommandError(f"not upgraded, and the running process goes on: {answer.get('why')}")
    return Account(**{name: answer[name] for name in Account.__slots__})
