"""Load, and its other end: echo server, requests, connections, a fixed rate. One thread, epoll, no GIL.

Every message carries its number, and pattern bytes that depend on it; every reply is compared with what was sent.
"""

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset

import array
import os
import socket as python_socket
import struct

cdef extern from *:
    """
    #include <errno.h>
    #include <netinet/in.h>
    #include <netinet/tcp.h>
    #include <sys/epoll.h>
    #include <sys/prctl.h>
    #include <sys/socket.h>
    #include <time.h>
    #include <unistd.h>
    """
    int errno
    enum:
        EAGAIN, EINPROGRESS, EINTR
        AF_INET, SOCK_STREAM, SOCK_NONBLOCK, SOCK_CLOEXEC, SOL_IP, IP_BIND_ADDRESS_NO_PORT, IPPROTO_TCP, TCP_NODELAY
        MSG_NOSIGNAL, MSG_DONTWAIT, EPOLLIN, EPOLLOUT, EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_MOD, CLOCK_MONOTONIC
        PR_SET_TIMERSLACK
    struct sockaddr:
        pass
    struct in_addr:
        uint32_t s_addr
    struct sockaddr_in:
        unsigned short sin_family
        uint16_t sin_port
        in_addr sin_addr
    ctypedef union epoll_data_t:
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    struct timespec:
        long tv_sec
        long tv_nsec
    int socket(int domain, int kind, int protocol) noexcept nogil
    int bind(int fd, const sockaddr *address, uint32_t length) noexcept nogil
    int connect(int fd, const sockaddr *address, uint32_t length) noexcept nogil
    int accept4(int fd, sockaddr *address, uint32_t *length, int flags) noexcept nogil
    int setsockopt(int fd, int level, int name, const void *value, uint32_t length) noexcept nogil
    ssize_t send(int fd, const void *data, size_t length, int flags) noexcept nogil
    ssize_t recv(int fd, void *data, size_t length, int flags) noexcept nogil
    int close(int fd) noexcept nogil
    int epoll_create1(int flags) noexcept nogil
    int epoll_ctl(int epoll, int operation, int fd, epoll_event *event) noexcept nogil
    int epoll_wait(int epoll, epoll_event *events, int room, int timeout_ms) noexcept nogil
    int epoll_pwait2(int epoll, epoll_event *events, int room, const timespec *timeout, const void *mask) noexcept nogil
    int clock_gettime(int clock, timespec *now) noexcept nogil
    int prctl(int option, unsigned long value) noexcept nogil
    uint16_t htons(uint16_t value) noexcept nogil
    uint32_t htonl(uint32_t value) noexcept nogil

cdef enum:
    EVENTS = 256
    LARGEST = 65536
    STALL_MS = 5000
    MAX_FD = 65536

cdef enum Failure:
    OK, DIFFERS, CLOSED, STALLED, SHORT_SEND, REFUSED

EXPLAINED = {
    DIFFERS: "a reply differs from what was sent",
    CLOSED: "a connection was closed or reset before its reply",
    STALLED: f"nothing arrived for {STALL_MS} ms",
    SHORT_SEND: "the socket took less than one message",
    REFUSED: "connect failed",
}


class LoadError(Exception):
    """A check failed: the run is void."""


cdef struct Target:
    sockaddr_in address
    uint32_t first_source  # host order; 0: the kernel picks
    uint32_t n_sources

cdef char pattern[LARGEST + 256]
for i, byte in enumerate((os.urandom(251) * (LARGEST // 251 + 4))[: LARGEST + 256]):
    pattern[i] = <char><unsigned char>byte


cdef inline int64_t now_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec * <int64_t>1000000000 + now.tv_nsec


cdef inline void fill(char *message, uint64_t serial, size_t size) noexcept nogil:
    memcpy(message, pattern + (serial & 255), size)
    memcpy(message, &serial, 8)


cdef inline bint is_intact(const char *message, uint64_t serial, size_t size) noexcept nogil:
    return memcmp(message, &serial, 8) == 0 and memcmp(message + 8, pattern + (serial & 255) + 8, size - 8) == 0


cdef inline int send_message(int fd, char *scratch, uint64_t serial, size_t size) noexcept nogil:
    fill(scratch, serial, size)
    cdef ssize_t sent = send(fd, scratch, size, MSG_NOSIGNAL | MSG_DONTWAIT)
    if sent == <ssize_t>size:
        return OK
    return SHORT_SEND if sent >= 0 or errno == EAGAIN else CLOSED


cdef inline int watch(int epoll, int operation, int fd, uint32_t events, uint64_t data) noexcept nogil:
    cdef epoll_event event
    event.events = events
    event.data.u64 = data
    return epoll_ctl(epoll, operation, fd, &event)


cdef int open_socket(Target *target, uint64_t serial, int flags) noexcept nogil:
    """A connected (or, with SOCK_NONBLOCK, connecting) socket; -1 when refused. Sources go round so that ports last."""
    cdef int one = 1
    cdef sockaddr_in source
    cdef int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | flags, 0)
    if fd < 0:
        return -1
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one))
    if target.first_source:
        memset(&source, 0, sizeof(source))
        source.sin_family = AF_INET
        source.sin_addr.s_addr = htonl(target.first_source + <uint32_t>(serial % target.n_sources))
        setsockopt(fd, SOL_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof(one))
        if bind(fd, <sockaddr *>&source, sizeof(source)) != 0:
            close(fd)
            return -1
    if connect(fd, <sockaddr *>&target.address, sizeof(target.address)) != 0 and errno != EINPROGRESS:
        close(fd)
        return -1
    return fd


cdef Target make_target(str host, int port, str first_source, int n_sources) except *:
    cdef Target target
    memset(&target, 0, sizeof(target))
    target.address.sin_family = AF_INET
    target.address.sin_port = htons(port)
    target.address.sin_addr.s_addr = htonl(struct.unpack("!I", python_socket.inet_aton(host))[0])
    if first_source:
        target.first_source = struct.unpack("!I", python_socket.inet_aton(first_source))[0]
        target.n_sources = n_sources
    return target


cdef void raise_failure(int failure) except *:
    if failure != OK:
        raise LoadError(EXPLAINED[failure])


# ---------------------------------------------------------------- the other end

cdef struct Unsent:
    size_t start
    size_t end
    char data[LARGEST]


cdef inline void drop(int fd, Unsent **unsent) noexcept nogil:
    free(unsent[fd])
    unsent[fd] = NULL
    close(fd)


cdef void echo(int epoll, int fd, Unsent **unsent, char *scratch) noexcept nogil:
    """Sends back what has arrived. Reads no more while something is unsent."""
    cdef Unsent *left = unsent[fd]
    cdef ssize_t got, sent
    if left != NULL:
        sent = send(fd, left.data + left.start, left.end - left.start, MSG_NOSIGNAL)
        if sent < 0:
            if errno != EAGAIN:
                drop(fd, unsent)
            return
        left.start += sent
        if left.start == left.end:
            free(left)
            unsent[fd] = NULL
            watch(epoll, EPOLL_CTL_MOD, fd, EPOLLIN, fd)
        return
    got = recv(fd, scratch, LARGEST, 0)
    if got <= 0:
        if got == 0 or errno != EAGAIN:
            drop(fd, unsent)
        return
    sent = send(fd, scratch, got, MSG_NOSIGNAL)
    if sent == got:
        return
    if sent < 0 and errno != EAGAIN:
        drop(fd, unsent)
        return
    left = <Unsent *>malloc(sizeof(Unsent))
    left.start = 0
    left.end = got - (sent if sent > 0 else 0)
    memcpy(left.data, scratch + got - left.end, left.end)
    unsent[fd] = left
    watch(epoll, EPOLL_CTL_MOD, fd, EPOLLOUT, fd)


def serve_echo(int listener):
    """Echoes on every connection of a non-blocking listening socket, for ever; a connection inherits its NODELAY."""
    cdef int epoll = epoll_create1(EPOLL_CLOEXEC), n, i, fd, accepted
    cdef epoll_event events[EVENTS]
    cdef Unsent **unsent = <Unsent **>calloc(MAX_FD, sizeof(Unsent *))
    cdef char *scratch = <char *>malloc(LARGEST)
    watch(epoll, EPOLL_CTL_ADD, listener, EPOLLIN, listener)
    with nogil:
        while True:
            n = epoll_wait(epoll, events, EVENTS, -1)
            for i in range(n):
                fd = <int>events[i].data.u64
                if fd != listener:
                    echo(epoll, fd, unsent, scratch)
                    continue
                while True:
                    # All that wait: with one a turn the queue would be this server's, whatever the proxy does.
                    accepted = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)
                    if accepted < 0:
                        break
                    watch(epoll, EPOLL_CTL_ADD, accepted, EPOLLIN, accepted)


# ---------------------------------------------------------------- load

cdef class Connections:
    """Open connections to an echo server behind ``host:port``; each has answered one message of ``size`` bytes."""

    cdef int n, epoll
    cdef int *fds
    cdef size_t size
    cdef uint64_t *serials  # what each connection waits for
    cdef size_t *got
    cdef char *buffers  # two messages for each connection
    cdef char *scratch

    def __cinit__(self, str host, int port, int n, size_t size, str first_source, int n_sources):
        if not 16 <= size <= LARGEST:
            raise ValueError(f"size: {size} is not between 16 and {LARGEST}")
        cdef Target target = make_target(host, port, first_source, n_sources)
        self.n = n
        self.size = size
        self.fds = <int *>malloc(n * sizeof(int))
        self.serials = <uint64_t *>calloc(n, sizeof(uint64_t))
        self.got = <size_t *>calloc(n, sizeof(size_t))
        self.buffers = <char *>malloc(n * size * 2)
        self.scratch = <char *>malloc(LARGEST)
        self.epoll = epoll_create1(EPOLL_CLOEXEC)
        cdef int i, failure = OK
        memset(self.fds, 0xff, n * sizeof(int))
        with nogil:
            for i in range(n):
                self.fds[i] = open_socket(&target, i, 0)
                if self.fds[i] < 0:
                    failure = REFUSED
                    break
                watch(self.epoll, EPOLL_CTL_ADD, self.fds[i], EPOLLIN, i)
                failure = self.exchange_once(i)
                if failure != OK:
                    break
        raise_failure(failure)

    def __dealloc__(self):
        for i in range(self.n):
            if self.fds[i] >= 0:
                close(self.fds[i])
        close(self.epoll)
        free(self.fds)
        free(self.serials)
        free(self.got)
        free(self.buffers)
        free(self.scratch)

    cdef int exchange_once(self, int i) noexcept nogil:
        cdef epoll_event event
        cdef int failure = send_message(self.fds[i], self.scratch, i, self.size)
        self.serials[i] = i
        while failure == OK:
            if epoll_wait(self.epoll, &event, 1, STALL_MS) == 0:
                return STALLED
            if event.data.u64 != <uint64_t>i:
                return CLOSED
            failure = self.receive(i)
            if failure == OK and self.got[i] == 0:
                return OK
        return failure

    cdef int receive(self, int i) noexcept nogil:
        """Takes what is there. ``got`` is 0 afterwards when a reply is complete and right."""
        cdef char *buffer = self.buffers + i * self.size
        cdef ssize_t n = recv(self.fds[i], buffer + self.got[i], self.size - self.got[i], MSG_DONTWAIT)
        if n <= 0:
            return OK if n < 0 and errno == EAGAIN else CLOSED
        self.got[i] += n
        if self.got[i] == self.size:
            self.got[i] = 0
            return OK if is_intact(buffer, self.serials[i], self.size) else DIFFERS
        return OK

    def exchange(self, long count):
        """``count`` requests, one at a time on each connection. Gives the seconds it took. Raises LoadError."""
        cdef epoll_event events[EVENTS]
        cdef long issued = 0, done = 0
        cdef int i, k, n, failure = OK
        cdef int64_t start = now_ns()
        with nogil:
            for i in range(self.n):
                if issued < count and failure == OK:
                    failure = self.ask(i, issued)
                    issued += 1
            while done < count and failure == OK:
                n = epoll_wait(self.epoll, events, EVENTS, STALL_MS)
                if n == 0:
                    failure = STALLED
                for k in range(n):
                    i = <int>events[k].data.u64
                    failure = self.receive(i)
                    if failure != OK:
                        break
                    if self.got[i]:
                        continue
                    done += 1
                    if issued < count:
                        failure = self.ask(i, issued)
                        issued += 1
                        if failure != OK:
                            break
        raise_failure(failure)
        return (now_ns() - start) / 1e9

    cdef int ask(self, int i, uint64_t serial) noexcept nogil:
        self.serials[i] = serial
        return send_message(self.fds[i], self.scratch, serial, self.size)

    def pace(self, double rate, long count):
        """``count`` requests, number i due at start + i / rate whatever the replies do, connections in turn.

        Gives (start in monotonic ns, array of ns from when each was due to its reply, most ns that a send was late).
        Raises LoadError.
        """
        latencies = array.array("q", bytes(8 * count))
        cdef int64_t[::1] latency = latencies
        cdef epoll_event events[EVENTS]
        cdef timespec wait
        cdef long issued = 0, done = 0
        cdef int i, k, n, failure = OK
        cdef int64_t now, due, late = 0, heard
        prctl(PR_SET_TIMERSLACK, 1)
        cdef int64_t start = now_ns() + 1000000
        with nogil:
            heard = start
            while done < count and failure == OK:
                now = now_ns()
                due = start + <int64_t>(issued * 1e9 / rate)
                while issued < count and due <= now and failure == OK:
                    late = max(late, now - due)
                    failure = send_message(self.fds[issued % self.n], self.scratch, issued, self.size)
                    issued += 1
                    due = start + <int64_t>(issued * 1e9 / rate)
                    now = now_ns()
                if failure != OK:
                    break
                if issued == count:
                    due = now + 100000000
                if now - heard > STALL_MS * <int64_t>1000000:
                    failure = STALLED
                    break
                wait.tv_sec = max(0, due - now) // 1000000000
                wait.tv_nsec = max(0, due - now) % 1000000000
                n = epoll_pwait2(self.epoll, events, EVENTS, &wait, NULL)
                for k in range(n):
                    i = <int>events[k].data.u64
                    failure = self.receive_paced(i, start, rate, &latency[0], count, &done)
                    if failure != OK:
                        break
                if n > 0:
                    heard = now_ns()
        raise_failure(failure)
        return start, latencies, late

    cdef int receive_paced(
        self, int i, int64_t start, double rate, int64_t *latency, long count, long *done
    ) noexcept nogil:
        """Like receive, for several replies in one read; they tell their own numbers."""
        cdef char *buffer = self.buffers + i * self.size * 2
        cdef ssize_t n = recv(self.fds[i], buffer + self.got[i], self.size * 2 - self.got[i], MSG_DONTWAIT)
        cdef int64_t now = now_ns()
        cdef uint64_t serial
        cdef size_t at = 0
        if n <= 0:
            return OK if n < 0 and errno == EAGAIN else CLOSED
        self.got[i] += n
        while self.got[i] - at >= self.size:
            memcpy(&serial, buffer + at, 8)
            if serial >= <uint64_t>count or latency[serial] or not is_intact(buffer + at, serial, self.size):
                return DIFFERS
            latency[serial] = now - start - <int64_t>(serial * 1e9 / rate)
            done[0] += 1
            at += self.size
        self.got[i] -= at
        memcpy(buffer, buffer + at, self.got[i])
        return OK


cdef struct Slot:
    int fd
    uint64_t serial
    size_t got
    bint sent
    char *buffer


cdef int begin(Slot *slot, int epoll, uint64_t i, Target *target, uint64_t serial, size_t size, char *scratch) noexcept nogil:
    """A new connection for this slot. Over loopback the handshake is mostly done when connect returns: ask at once."""
    cdef int failure
    slot.fd = open_socket(target, serial, SOCK_NONBLOCK)
    if slot.fd < 0:
        return REFUSED
    slot.serial = serial
    slot.got = 0
    failure = send_message(slot.fd, scratch, serial, size)
    slot.sent = failure == OK
    if failure != OK and (failure != SHORT_SEND or errno != EAGAIN):
        return failure
    watch(epoll, EPOLL_CTL_ADD, slot.fd, EPOLLIN if slot.sent else EPOLLIN | EPOLLOUT, i)
    return OK


cdef int go_on(Slot *slot, int epoll, uint64_t i, size_t size, char *scratch, bint *ended) noexcept nogil:
    cdef ssize_t n
    ended[0] = False
    if not slot.sent:
        slot.sent = True
        watch(epoll, EPOLL_CTL_MOD, slot.fd, EPOLLIN, i)
        return send_message(slot.fd, scratch, slot.serial, size)
    n = recv(slot.fd, slot.buffer + slot.got, size - slot.got, 0)
    if n <= 0:
        return OK if n < 0 and errno == EAGAIN else CLOSED
    slot.got += n
    if slot.got < size:
        return OK
    if not is_intact(slot.buffer, slot.serial, size):
        return DIFFERS
    close(slot.fd)
    slot.fd = -1
    ended[0] = True
    return OK


cdef inline void give_up(Slot *slot) noexcept nogil:
    if slot.fd >= 0:
        close(slot.fd)
        slot.fd = -1


def connect_each(
    str host, int port, long count, int concurrency, size_t size, str first_source, int n_sources, uint64_t first_serial
):
    """``count`` times connect, ask, check the reply, close; ``concurrency`` at once. Gives the seconds it took.

    Raises LoadError.
    """
    cdef Target target = make_target(host, port, first_source, n_sources)
    cdef epoll_event events[EVENTS]
    cdef Slot *slots = <Slot *>calloc(concurrency, sizeof(Slot))
    cdef char *buffers = <char *>malloc(concurrency * size)
    cdef char *scratch = <char *>malloc(LARGEST)
    cdef int epoll = epoll_create1(EPOLL_CLOEXEC), i, k, n, failure = OK
    cdef long issued = 0, done = 0
    cdef bint ended
    cdef int64_t start = now_ns()
    with nogil:
        for i in range(concurrency):
            slots[i].fd = -1
            slots[i].buffer = buffers + i * size
        for i in range(concurrency):
            if issued < count and failure == OK:
                failure = begin(&slots[i], epoll, i, &target, first_serial + issued, size, scratch)
                issued += 1
        while done < count and failure == OK:
            n = epoll_wait(epoll, events, EVENTS, STALL_MS)
            if n == 0:
                failure = STALLED
            for k in range(n):
                i = <int>events[k].data.u64
                failure = go_on(&slots[i], epoll, i, size, scratch, &ended)
                if failure != OK:
                    break
                if ended:
                    done += 1
                    if issued < count:
                        failure = begin(&slots[i], epoll, i, &target, first_serial + issued, size, scratch)
                        issued += 1
                        if failure != OK:
                            break
        for i in range(concurrency):
            if slots[i].fd >= 0:
                close(slots[i].fd)
        close(epoll)
        free(slots)
        free(buffers)
        free(scratch)
    raise_failure(failure)
    return (now_ns() - start) / 1e9


def connect_paced(
    str host, int port, double rate, long count, int concurrency, size_t size, str first_source, int n_sources,
    uint64_t first_serial
):
    """``count`` times connect, ask, check the reply, close; number i due at start + i / rate whatever the others do.

    One that is due when ``concurrency`` are under way waits for a place. Gives (array of ns from when each was due to its
    reply, 0 where it failed; how many failed, by what happened; most ns that one began late).
    """
    latencies = array.array("q", bytes(8 * count))
    cdef int64_t[::1] latency = latencies
    cdef Target target = make_target(host, port, first_source, n_sources)
    cdef epoll_event events[EVENTS]
    cdef timespec wait
    cdef Slot *slots = <Slot *>calloc(concurrency, sizeof(Slot))
    cdef int *places = <int *>malloc(concurrency * sizeof(int))
    cdef char *buffers = <char *>malloc(concurrency * size)
    cdef char *scratch = <char *>malloc(LARGEST)
    cdef long failures[REFUSED + 1]
    cdef long issued = 0, done = 0
    cdef int epoll = epoll_create1(EPOLL_CLOEXEC), free_places = concurrency, i, k, n, failure
    cdef bint ended
    cdef int64_t now, due, until, heard, late = 0
    cdef uint64_t at
    memset(failures, 0, sizeof(failures))
    prctl(PR_SET_TIMERSLACK, 1)
    cdef int64_t start = now_ns() + 1000000
    with nogil:
        heard = start
        for i in range(concurrency):
            slots[i].fd = -1
            slots[i].buffer = buffers + i * size
            places[i] = i
        while done < count:
            now = now_ns()
            due = start + <int64_t>(issued * 1e9 / rate)
            while issued < count and due <= now and free_places > 0:
                late = max(late, now - due)
                i = places[free_places - 1]
                failure = begin(&slots[i], epoll, i, &target, first_serial + issued, size, scratch)
                issued += 1
                if failure == OK:
                    free_places -= 1
                else:
                    give_up(&slots[i])
                    failures[failure] += 1
                    done += 1
                due = start + <int64_t>(issued * 1e9 / rate)
                now = now_ns()
            if free_places == concurrency:
                heard = now
            if now - heard > STALL_MS * <int64_t>1000000:
                for i in range(concurrency):
                    if slots[i].fd >= 0:
                        give_up(&slots[i])
                        places[free_places] = i
                        free_places += 1
                        failures[<int>STALLED] += 1
                        done += 1
                continue
            until = due if issued < count and free_places > 0 else now + 100000000
            wait.tv_sec = max(0, until - now) // 1000000000
            wait.tv_nsec = max(0, until - now) % 1000000000
            n = epoll_pwait2(epoll, events, EVENTS, &wait, NULL) if done < count else 0
            for k in range(n):
                i = <int>events[k].data.u64
                failure = go_on(&slots[i], epoll, i, size, scratch, &ended)
                if failure == OK and not ended:
                    continue
                if failure == OK:
                    at = slots[i].serial - first_serial
                    latency[at] = now_ns() - start - <int64_t>(at * 1e9 / rate)
                else:
                    give_up(&slots[i])
                    failures[failure] += 1
                places[free_places] = i
                free_places += 1
                done += 1
            if n > 0:
                heard = now_ns()
        close(epoll)
        free(slots)
        free(places)
        free(buffers)
        free(scratch)
    return latencies, {EXPLAINED[i]: failures[i] for i in range(OK + 1, REFUSED + 1) if failures[i]}, late
