"""The load of the benchmark: an echo server and clients, each one epoll loop in compiled code, much lighter than what they measure.

``echo``: answers every message with itself. ``conversations``: N connections that ping-pong. ``connects``: N at a time that connect, ask,
are answered and close. ``fixed_rate``: messages at set times whatever the answers do, so that a stall counts for all it delays.
Every answer is compared with its question.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset

cdef extern from *:
    """
    #include <arpa/inet.h>
    #include <errno.h>
    #include <netinet/in.h>
    #include <netinet/tcp.h>
    #include <sys/epoll.h>
    #include <sys/socket.h>
    #include <time.h>
    #include <unistd.h>
    """
    int errno
    enum:
        EAGAIN, EINPROGRESS, AF_INET, SOCK_STREAM, SOCK_NONBLOCK, SOL_SOCKET, SO_REUSEADDR, SO_LINGER, IPPROTO_TCP, TCP_NODELAY
        SOL_IP, IP_BIND_ADDRESS_NO_PORT, EPOLLIN, EPOLLOUT, EPOLLERR, EPOLLHUP, EPOLLRDHUP, EPOLLET, EPOLL_CTL_ADD, EPOLL_CTL_MOD
        CLOCK_MONOTONIC, MSG_NOSIGNAL, SO_ERROR
    ctypedef unsigned int socklen_t
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
    int bind(int fd, const sockaddr *address, socklen_t length) noexcept nogil
    int listen(int fd, int backlog) noexcept nogil
    int accept4(int fd, sockaddr *address, socklen_t *length, int flags) noexcept nogil
    int connect(int fd, const sockaddr *address, socklen_t length) noexcept nogil
    int setsockopt(int fd, int level, int name, const void *value, socklen_t length) noexcept nogil
    ssize_t recv(int fd, void *buffer, size_t length, int flags) noexcept nogil
    ssize_t send(int fd, const void *buffer, size_t length, int flags) noexcept nogil
    int close(int fd) noexcept nogil
    int epoll_create1(int flags) noexcept nogil
    int epoll_ctl(int epoll_fd, int operation, int fd, epoll_event *event) noexcept nogil
    int epoll_wait(int epoll_fd, epoll_event *events, int most, int timeout_ms) noexcept nogil
    int clock_gettime(int clock, timespec *ts) noexcept nogil
    uint16_t htons(uint16_t value) noexcept nogil
    uint32_t htonl(uint32_t value) noexcept nogil

cdef enum:
    MESSAGE = 64
    EVENTS = 256


cdef uint64_t now_ns() noexcept nogil:
    cdef timespec ts
    clock_gettime(CLOCK_MONOTONIC, &ts)
    return <uint64_t> ts.tv_sec * 1000000000 + <uint64_t> ts.tv_nsec


cdef void set_address(sockaddr_in *address, uint32_t host, uint16_t port) noexcept nogil:
    memset(address, 0, sizeof(sockaddr_in))
    address.sin_family = AF_INET
    address.sin_port = htons(port)
    address.sin_addr.s_addr = htonl(host)


cdef int open_connection(uint32_t host, uint16_t port, uint32_t source) noexcept nogil:
    # A connection under way, or -1. A source address each keeps ports from running out.
    cdef sockaddr_in address
    cdef int one = 1
    cdef int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0)
    if fd < 0:
        return -1
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one))
    if source:
        setsockopt(fd, SOL_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof(one))
        set_address(&address, source, 0)
        if bind(fd, <sockaddr *> &address, sizeof(address)) != 0:
            close(fd)
            return -1
    set_address(&address, host, port)
    if connect(fd, <sockaddr *> &address, sizeof(address)) != 0 and errno != EINPROGRESS:
        close(fd)
        return -1
    return fd


cdef void fill(uint8_t *message, uint64_t number) noexcept nogil:
    cdef int i
    memcpy(message, &number, 8)
    for i in range(8, MESSAGE):
        message[i] = <uint8_t> (number + i)


cdef int watch(int epoll_fd, int fd, uint64_t data, uint32_t events) noexcept nogil:
    cdef epoll_event event
    event.events = events
    event.data.u64 = data
    return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event)


cdef int run_echo(int listening) noexcept nogil:
    cdef int epoll_fd = epoll_create1(0)
    cdef epoll_event events[EVENTS]
    cdef uint8_t buffer[65536]
    cdef ssize_t n
    cdef int i, count, fd, one = 1
    watch(epoll_fd, listening, <uint64_t> listening, EPOLLIN)
    while True:
        count = epoll_wait(epoll_fd, events, EVENTS, -1)
        for i in range(count):
            fd = <int> events[i].data.u64
            if fd == listening:
                fd = accept4(listening, NULL, NULL, SOCK_NONBLOCK)
                if fd >= 0:
                    watch(epoll_fd, fd, <uint64_t> fd, EPOLLIN)
                continue
            n = recv(fd, buffer, sizeof(buffer), 0)
            if n > 0:
                n = send(fd, buffer, <size_t> n, MSG_NOSIGNAL)
            elif n == 0 or errno != EAGAIN:
                close(fd)
    return 0


def echo(uint16_t port, ready):
    """Serves until the process ends, on all addresses. ``ready(port)`` is called when it listens."""
    cdef sockaddr_in address
    cdef int one = 1
    cdef int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0)
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one))
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one))
    set_address(&address, 0, port)
    if bind(fd, <sockaddr *> &address, sizeof(address)) != 0 or listen(fd, 4096) != 0:
        raise OSError(errno, "echo server")
    ready(port)
    with nogil:
        run_echo(fd)


def conversations(uint32_t host, uint16_t port, int n, double seconds, uint32_t first_source=0, int hold=0):
    """Ping-pong on ``n`` connections for ``seconds``. Gives (messages, errors)."""
    cdef int epoll_fd = epoll_create1(0)
    cdef int *fds = <int *> calloc(n, sizeof(int))
    cdef uint64_t *numbers = <uint64_t *> calloc(n, sizeof(uint64_t))
    cdef epoll_event events[EVENTS]
    cdef uint8_t message[MESSAGE]
    cdef uint8_t buffer[MESSAGE * 2]
    cdef uint64_t end, done = 0, errors = 0
    cdef int i, j, count
    with nogil:
        for i in range(n):
            fds[i] = open_connection(host, port, first_source + i if first_source else 0)
            watch(epoll_fd, fds[i], i, EPOLLOUT | EPOLLET | EPOLLIN)
        end = now_ns() + <uint64_t> (seconds * 1e9)
        while now_ns() < end:
            count = epoll_wait(epoll_fd, events, EVENTS, 100)
            for j in range(count):
                i = <int> events[j].data.u64
                if events[j].events & (EPOLLERR | EPOLLHUP):
                    errors += 1
                    continue
                if events[j].events & EPOLLIN:
                    if recv(fds[i], buffer, sizeof(buffer), 0) != MESSAGE:
                        continue
                    fill(message, numbers[i])
                    if memcmp(buffer, message, MESSAGE) != 0:
                        errors += 1
                    done += 1
                    numbers[i] += 1
                elif numbers[i]:
                    continue
                else:
                    numbers[i] = 1
                fill(message, numbers[i])
                if send(fds[i], message, MESSAGE, MSG_NOSIGNAL) != MESSAGE:
                    errors += 1
        for i in range(n):
            close(fds[i])
        close(epoll_fd)
    free(fds)
    free(numbers)
    return done, errors


def connects(uint32_t host, uint16_t port, int n, uint64_t total, uint32_t first_source):
    """``total`` connections, ``n`` at a time, each asks once and closes after the answer. Gives (done, errors)."""
    cdef int epoll_fd = epoll_create1(0)
    cdef int *fds = <int *> calloc(n, sizeof(int))
    cdef epoll_event events[EVENTS]
    cdef uint8_t message[MESSAGE]
    cdef uint8_t buffer[MESSAGE * 2]
    cdef uint64_t started = 0, done = 0, errors = 0, quiet = 0
    cdef int i, j, count
    fill(message, 7)
    with nogil:
        for i in range(n):
            fds[i] = open_connection(host, port, first_source + <uint32_t> (started & 127))
            watch(epoll_fd, fds[i], i, EPOLLOUT | EPOLLET | EPOLLIN)
            started += 1
        while done + errors < total and quiet < 50:
            count = epoll_wait(epoll_fd, events, EVENTS, 100)
            quiet = 0 if count else quiet + 1
            for j in range(count):
                i = <int> events[j].data.u64
                if events[j].events & (EPOLLIN | EPOLLERR | EPOLLHUP) == 0:
                    if send(fds[i], message, MESSAGE, MSG_NOSIGNAL) != MESSAGE:
                        errors += 1
                    continue
                if recv(fds[i], buffer, sizeof(buffer), 0) == MESSAGE and memcmp(buffer, message, MESSAGE) == 0:
                    done += 1
                else:
                    errors += 1
                close(fds[i])
                fds[i] = -1
                if started < total:
                    fds[i] = open_connection(host, port, first_source + <uint32_t> (started & 127))
                    if fds[i] < 0:
                        errors += 1
                    else:
                        watch(epoll_fd, fds[i], i, EPOLLOUT | EPOLLET | EPOLLIN)
                    started += 1
        for i in range(n):
            if fds[i] >= 0:
                close(fds[i])
        close(epoll_fd)
    free(fds)
    return done, errors


def fixed_rate(uint32_t host, uint16_t port, int n, double rate, double seconds):
    """``rate`` messages a second over ``n`` connections, each at its set time. Gives (latencies in ns from the set time,
    messages not answered)."""
    cdef int epoll_fd = epoll_create1(0)
    cdef int *fds = <int *> calloc(n, sizeof(int))
    cdef uint64_t total = <uint64_t> (rate * seconds)
    cdef uint64_t *set_at = <uint64_t *> calloc(total, sizeof(uint64_t))
    cdef uint64_t *latency = <uint64_t *> calloc(total, sizeof(uint64_t))
    cdef epoll_event events[EVENTS]
    cdef uint8_t message[MESSAGE]
    cdef uint8_t buffer[65536]
    cdef uint64_t begin, now, sent = 0, answered = 0, number, limit
    cdef ssize_t got, at
    cdef int i, j, count
    cdef double gap = 1e9 / rate
    with nogil:
        for i in range(n):
            fds[i] = open_connection(host, port, 0)
            watch(epoll_fd, fds[i], i, EPOLLIN)
        epoll_wait(epoll_fd, events, EVENTS, 200)
        begin = now_ns()
        limit = begin + <uint64_t> ((seconds + 2) * 1e9)
        while answered < total and now_ns() < limit:
            now = now_ns()
            while sent < total and begin + <uint64_t> (sent * gap) <= now:
                set_at[sent] = begin + <uint64_t> (sent * gap)
                fill(message, sent)
                send(fds[sent % <uint64_t> n], message, MESSAGE, MSG_NOSIGNAL)
                sent += 1
            count = epoll_wait(epoll_fd, events, EVENTS, 0)
            for j in range(count):
                i = <int> events[j].data.u64
                got = recv(fds[i], buffer, sizeof(buffer), 0)
                now = now_ns()
                at = 0
                while at + MESSAGE <= got:
                    memcpy(&number, buffer + at, 8)
                    if number < total:
                        latency[answered] = now - set_at[number]
                        answered += 1
                    at += MESSAGE
        for i in range(n):
            close(fds[i])
        close(epoll_fd)
    result = [latency[number] for number in range(answered)]
    free(fds)
    free(set_at)
    free(latency)
    return result, total - answered


def hold(uint32_t host, uint16_t port, int n, uint32_t first_source):
    """``n`` connections that have each exchanged one message. Gives their descriptors."""
    cdef uint8_t buffer[MESSAGE]
    cdef uint8_t message[MESSAGE]
    cdef int i, fd
    cdef ssize_t got
    fds = []
    fill(message, 1)
    for i in range(n):
        fd = open_connection(host, port, first_source + <uint32_t> (i & 127))
        if fd < 0:
            break
        with nogil:
            while send(fd, message, MESSAGE, MSG_NOSIGNAL) != MESSAGE and errno == EAGAIN:
                pass
            got = recv(fd, buffer, MESSAGE, 0)
            while got < 0 and errno == EAGAIN:
                got = recv(fd, buffer, MESSAGE, 0)
        if got != MESSAGE:
            break
        fds.append(fd)
    return fds
