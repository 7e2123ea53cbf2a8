"""The compiled data path: epoll loops that run without the GIL, and the few objects through which Python steers them.

Read it top to bottom and you follow a connection: accept, admit, dial, connected, relay, reset, close, record; then comes the loop
that calls these. The leaves in ``_native/`` hold what has a name of its own: ``relay`` one half, ``balance`` picking, ``route`` routing,
``wheel`` timers, ``slab`` slots, ``ring`` records, ``lanes`` whose turn it is, ``rates``, ``places`` and ``retries`` limits. The Python
face is in the parts that are included at the end.

* **Threads.** Each worker owns its epoll, its connections, its pipes, its timers and its counters. Shared are only the published
  plan (loaded once a turn), the counters that limits and balancing need (relaxed atomics) and the rings.
* **Triggering.** Connections are edge-triggered and added once: what an edge said is kept in ``side_t.flags`` until a call says
  otherwise. Listeners are level-triggered. A half that could go on for ever is put on the ready list when its budget is used up.
* **Order of ends.** A FIN is passed on when everything before it was handed over; the second FIN closes both sockets. A reset
  is passed on when everything before it was *acknowledged* (``SIOCOUTQ``), because a reset throws away what is still queued.
* **Timeouts end with a reset.** Neither peer said that it was done, so neither is told so.
* **Stale events.** Slot, generation and attempt are in the event's data; what does not match is of an earlier life.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset, strcmp, strdup
from posix.stdlib cimport posix_memalign

from l4mesh._native.address cimport address_hash_ip, address_is_loopback, address_is_v4, address_t, mix64
from l4mesh._native.atomic cimport (
    add, add_ordered, add_u, exchange, fence, load, load_acquire, load_ordered, load_pointer, load_u, store, store_pointer, store_release,
    store_u, swap_u,
)
from l4mesh._native.authz cimport filing_key, masked_hash, verdict_allows, verdict_find, verdict_would_allow
from l4mesh._native.balance cimport (
    PICK_FULL, cluster_build, cluster_drop, cluster_has_untried, cluster_hold, cluster_pick, cluster_settings_t, cluster_t, endpoint_t,
    pick_t,
)
from l4mesh._native.bandwidth cimport (
    OWN_PER_S, OWN_QUANTUM_MIN, bucket_change, bucket_drop, bucket_quantum, bucket_set, bucket_t, lane_share, lane_t,
)
from l4mesh._native.debug cimport L4_BUG
from l4mesh._native.gcrypt cimport *
from l4mesh._native.handover cimport passage_pack, passage_unpack
from l4mesh._native.hello cimport HELLO_FOUND, HELLO_INVALID, HELLO_NOT_TLS, HELLO_PARTIAL, hello_parse, hello_t
from l4mesh._native.ipsec_mb cimport *
from l4mesh._native.lanes cimport LANE_DIRECT, LANE_EVENTS, LANE_TURN, LANES_FULL, lane_is_in_use, lanes_init, lanes_pop, lanes_push
from l4mesh._native.linux cimport *
from l4mesh._native.openssl cimport *
from l4mesh._native.outlier cimport (
    outlier_connected, outlier_dial_failed, outlier_ended, outlier_finished, outlier_lived, outlier_next, outlier_refused_tls,
    outlier_take,
)
from l4mesh._native.overload cimport (
    SHARE_BUCKETS, overload_count, overload_ends, overload_pauses, overload_source_limit, share_least, sources_measure,
)
from l4mesh._native.places cimport line_join, line_leave, place_take, places_offer
from l4mesh._native.proxy_protocol cimport PROXY_MAX, PROXY_PARTIAL, proxy_parse, proxy_write_v1, proxy_write_v2
from l4mesh._native.queue cimport lane_hint, queue_push, queue_remove
from l4mesh._native.rates cimport arrival_take, rate_take
from l4mesh._native.relay cimport (
    PACE_NS, clamp_us, half_drop, half_pace, half_park, half_release_pipe, half_set_pace, half_step, pipe_close,
)
from l4mesh._native.retries cimport retry_pause_ms, retry_take
from l4mesh._native.ring cimport ring_claim, ring_park, ring_peek, ring_pop, ring_push
from l4mesh._native.route cimport ports_hold, prefixes_hold, route_find, route_match
from l4mesh._native.shaping cimport (
    conn_is_faulted, fault_choose, fault_time_ms, shaping_free, shaping_is_due, shaping_next_ms, shaping_open, shaping_waits,
)
from l4mesh._native.slab cimport conn_at, conn_timer, slab_give, slab_take
from l4mesh._native.sessions cimport given_free, session_find, sessions_free
from l4mesh._native.sources cimport sched_yield, source_give, source_take
from l4mesh._native.spiffe cimport (
    PATTERN_ANY, PATTERN_EXACT, PATTERN_PREFIX, fnv, fnv_reversed, pattern_t, spiffe_parse, spiffe_t,
)
from l4mesh._native.stats cimport (
    CLOSE_REASONS, CONNECT_BUCKETS, FAULT_KINDS, NAME_BYTES, SIGNALS, cluster_row_t, cluster_stat_t, connect_bucket, endpoint_stat_t,
    listener_row_t, listener_stat_t,
)
from l4mesh._native.tls cimport (
    HANDSHAKE_DONE, HANDSHAKE_FAILED, certificate_key, cluster_expects, context_configure, plan_revokes_chain, tls_bio_ctrl, tls_bio_read,
    tls_bio_write, tls_free, tls_handshake, tls_open, tls_park, unix_seconds,
)
from l4mesh._native.types cimport *
from l4mesh._native.watchdog cimport (
    DOING_ACCEPT, DOING_ADOPT, DOING_END, DOING_EVENT, DOING_HANDSHAKE, DOING_HELD, DOING_LANE, DOING_LINE, DOING_PAGE, DOING_READY,
    DOING_SWEEP, DOING_TIMER, DOING_TURN, DOING_WAIT, doing, l4_thread_id, watch, watch_allow_stack, watched_t,
)
from l4mesh._native.wheel cimport WHEEL_NONE, wheel_expire, wheel_init, wheel_insert, wheel_next_ms, wheel_remove

cdef extern from *:
    """
    #include <arpa/inet.h>
    """
    const char *inet_ntop(int family, const void *ip, char *text, socklen_t size) noexcept nogil

cdef enum:
    TAG_LISTENER = 0xffffffff     # in the place of a slot; the low half is the index of the armed listener
    TAG_WAKE = 0xfffffffe
    RATE_SOURCE = 0               # what a rate's key is of
    RATE_WORKLOAD = 1
    RATE_IDENTITY = 2
    RATE_KINDS = 3
    ACCEPT_BURST_MAX = 64
    ACCEPT_PAUSE_MS = 100         # as long as it takes for descriptors to come back, short enough not to be noticed
    SETTLE_MS = 2000              # keepalive is set on connections that live this long: most don't
    LEFT_GRACE_MS = 100           # a client that ended without a byte is taken to have left if we still dial after this
    LINGER_MAX_MS = 64            # longest step between two looks at a send queue that must drain before a reset
    RESET_LIMIT_MS = 60000        # how long a reset waits for that when no half-closed timeout is set
    EXPIRY_SPREAD_MS = 60000      # over which connections whose peer's certificate has expired end
    TUNE_BYTES = 1048576          # what makes a half a stream, whose socket is worth a look
    DEPART_SLOTS = 4096           # looked at in one turn for connections to hand over
    LATE_MS = 500                 # by which no timer is late while the worker runs
    LATE_TURNS = 1000             # that timers wait at most for events to be heard
    SWEEP_STEP = 256              # live connections that a sweep looks at in one turn
    LOOK_MS = 25                  # between two looks, of one that dials on, for a place at an endpoint it has not tried


# -- small things ------------------------------------------------------------------------------------------------------------

cdef inline uint64_t clock_ns(int clock) noexcept nogil:
    cdef timespec ts
    clock_gettime(clock, &ts)
    return <uint64_t> ts.tv_sec * 1000000000 + <uint64_t> ts.tv_nsec


cdef inline uint64_t worker_random(worker_t *worker) noexcept nogil:
    # xorshift64* (Vigna 2016)
    cdef uint64_t x = worker.random
    x ^= x >> 12
    x ^= x << 25
    x ^= x >> 27
    worker.random = x
    return x * <uint64_t> 0x2545f4914f6cdd1d


cdef inline void address_from_sockaddr(address_t *address, const sockaddr_storage *storage) noexcept nogil:
    cdef const sockaddr_in *v4 = <const sockaddr_in *> storage
    cdef const sockaddr_in6 *v6 = <const sockaddr_in6 *> storage
    memset(address, 0, sizeof(address_t))
    if storage.ss_family == AF_INET6:
        memcpy(address.ip, &v6.sin6_addr, 16)
        address.port = ntohs(v6.sin6_port)
    else:
        address.ip[10] = 0xff
        address.ip[11] = 0xff
        memcpy(&address.ip[12], &v4.sin_addr, 4)
        address.port = ntohs(v4.sin_port)


cdef inline socklen_t address_to_sockaddr(const address_t *address, sockaddr_storage *storage) noexcept nogil:
    cdef sockaddr_in *v4 = <sockaddr_in *> storage
    cdef sockaddr_in6 *v6 = <sockaddr_in6 *> storage
    memset(storage, 0, sizeof(sockaddr_in6))
    if address_is_v4(address):
        v4.sin_family = AF_INET
        v4.sin_port = htons(address.port)
        memcpy(&v4.sin_addr, &address.ip[12], 4)
        return sizeof(sockaddr_in)
    v6.sin6_family = AF_INET6
    v6.sin6_port = htons(address.port)
    memcpy(&v6.sin6_addr, address.ip, 16)
    return sizeof(sockaddr_in6)


cdef inline int socket_error(int fd) noexcept nogil:
    cdef int error = 0
    cdef socklen_t size = sizeof(error)
    getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size)
    return error


cdef inline void socket_close(int fd, bint reset) noexcept nogil:
    cdef linger now
    if fd < 0:
        return
    if reset:
        now.l_onoff = 1
        now.l_linger = 0
        setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now))
    close(fd)


cdef inline bint ip_is_unspecified(const address_t *address) noexcept nogil:
    cdef int i
    for i in range(12 if address_is_v4(address) else 0, 16):
        if address.ip[i]:
            return False
    return True


cdef bint ip_is_local(const address_t *address) noexcept nogil:
    # Whether the address is one of this host's, asked of the kernel by binding to it: always current, no list to keep. When it
    # can't be asked the answer is yes, because a wrong yes refuses one connection and a wrong no is a loop.
    cdef sockaddr_storage storage
    cdef address_t any_port = address[0]
    cdef socklen_t size
    cdef bint local
    cdef int fd
    any_port.port = 0
    size = address_to_sockaddr(&any_port, &storage)
    fd = socket(storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0)
    if fd < 0:
        return True
    local = bind(fd, <sockaddr *> &storage, size) == 0 or errno != EADDRNOTAVAIL
    close(fd)
    return local


cdef bint plan_is_own(const plan_t *plan, const address_t *address) noexcept nogil:
    # Whether a connection to this address would arrive at one of our own listeners.
    cdef uint32_t i
    cdef const address_t *own
    if plan.own_ports[address.port >> 3] & (1 << (address.port & 7)) == 0:
        return False
    for i in range(plan.n_own):
        own = &plan.own[i]
        if own.port != address.port or address_is_v4(own) != address_is_v4(address):
            continue
        if memcmp(own.ip, address.ip, 16) == 0 or ip_is_unspecified(address):
            return True
        if ip_is_unspecified(own) and ip_is_local(address):
            return True
    return False


cdef inline uint64_t event_tag(const conn_t *conn, uint32_t slot, int side) noexcept nogil:
    cdef uint64_t attempt = conn.attempts if side == UPSTREAM else 0
    return (<uint64_t> slot << 32) | (<uint64_t> conn.generation << 8) | (attempt << 1) | <uint64_t> side


cdef inline bint conn_watch(worker_t *worker, conn_t *conn, uint32_t slot, int side) noexcept nogil:
    # Adds a side to the epoll, once and for all it may tell.
    cdef epoll_event event
    event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLPRI | EPOLLET
    event.data.u64 = event_tag(conn, slot, side)
    conn.side[side].flags |= SIDE_WATCHED
    return epoll_ctl(worker.epoll_fd, EPOLL_CTL_ADD, conn.side[side].fd, &event) == 0


cdef inline void conn_arm(worker_t *worker, conn_t *conn, uint32_t slot, uint64_t at_ms) noexcept nogil:
    # Makes sure that the timer fires at `at_ms` or before. A timer that fires early looks again and goes on: traffic moves its
    # deadline without touching the wheel.
    if conn.timer.at_ms and conn.timer.at_ms <= at_ms:
        return
    wheel_remove(&worker.wheel, &conn.timer)
    wheel_insert(&worker.wheel, slot, &conn.timer, at_ms)


# -- accept ------------------------------------------------------------------------------------------------------------------

cdef void accept_pause(worker_t *worker) noexcept nogil:
    # Leaves new connections in the kernel's queue until something is free again; what is connected goes on.
    cdef epoll_event event
    cdef uint32_t i
    worker.accept_pauses += 1
    worker.accept_paused_until_ms = worker.now_ms + ACCEPT_PAUSE_MS
    for i in range(worker.n_armed):
        epoll_ctl(worker.epoll_fd, EPOLL_CTL_DEL, worker.armed[i].fd, &event)


cdef void accept_resume(worker_t *worker) noexcept nogil:
    cdef epoll_event event
    cdef uint32_t i
    worker.accept_paused_until_ms = 0
    worker.accept_spent = 0
    for i in range(worker.n_armed):
        event.events = EPOLLIN
        event.data.u64 = (<uint64_t> TAG_LISTENER << 32) | i
        if epoll_ctl(worker.epoll_fd, EPOLL_CTL_ADD, worker.armed[i].fd, &event) != 0 and errno != EEXIST:
            # The kernel is out of memory or of watches: once more in a moment, or nobody would ever be accepted here again.
            accept_pause(worker)
            return


cdef void worker_set_accept_mode(worker_t *worker, int64_t mode) noexcept nogil:
    # Stops accepting, or begins again. The sockets stay open: they are the control loop's.
    cdef epoll_event event
    cdef uint32_t i
    if mode == ACCEPT_ON:
        worker_arm(worker)
    elif worker.accept_mode == ACCEPT_ON:
        for i in range(worker.n_armed):
            if worker.accept_paused_until_ms == 0:
                epoll_ctl(worker.epoll_fd, EPOLL_CTL_DEL, worker.armed[i].fd, &event)
        for i in range(worker.n_armed):
            if mode == ACCEPT_EMPTY:
                worker.armed[i].burst = 65536
                listener_accept(worker, i)
        worker.n_armed = 0
        worker.accept_paused_until_ms = 0
    store_release(<uint64_t *> &worker.accept_mode, <uint64_t> mode)


cdef void listener_accept(worker_t *worker, uint32_t armed_index) noexcept nogil:
    # Takes as many connections as the queue was deep last time: the level-triggered epoll tells of the rest, which spares the
    # call that only says EAGAIN. While lanes are in use it is emptied faster, for the sake of those at its end.
    cdef armed_t *armed = &worker.armed[armed_index]
    cdef const listener_t *listener = &worker.plan.listeners[armed.listener]
    cdef sockaddr_storage storage
    cdef socklen_t size
    cdef uint32_t most = armed.burst
    cdef uint32_t taken = 0
    cdef int fd
    if worker.lanes.n and most <= ACCEPT_BURST_MAX:
        most = ACCEPT_BURST_MAX if worker.lanes.n < LANES_FULL else 0
    while taken < most:
        if load(&worker.engine.active) >= worker.plan.max_connections or (
            # Not where all that waits has to be taken.
            armed.burst <= ACCEPT_BURST_MAX and overload_pauses(worker)
        ):
            accept_pause(worker)
            return
        size = sizeof(storage)
        fd = accept4(armed.fd, <sockaddr *> &storage, &size, SOCK_NONBLOCK | SOCK_CLOEXEC)
        if fd < 0:
            if errno == EAGAIN:
                armed.burst = taken if taken else 1
            elif errno == EMFILE or errno == ENFILE or errno == ENOBUFS or errno == ENOMEM:
                accept_pause(worker)
            # Anything else is an error of the one connection that was to be accepted (accept(2)).
            return
        taken += 1
        worker.accept_spent += 1
        if not conn_accept(worker, listener, fd, &storage, worker.lanes.n or taken > LANE_DIRECT):
            accept_pause(worker)
            return
    armed.burst = armed.burst * 2 if armed.burst < ACCEPT_BURST_MAX else ACCEPT_BURST_MAX


cdef bint conn_accept(
    worker_t *worker, const listener_t *listener, int fd, const sockaddr_storage *storage, bint aside
) noexcept nogil:
    # A connection from its descriptor on, which it owns. `aside`: others wait, and it takes its turn. False: no memory.
    cdef uint32_t slot
    cdef conn_t *conn = slab_take(worker, &slot)
    if conn == NULL:
        # Counted all the same; only a record of it there can't be.
        worker.accepted += 1
        listener.stat.rows[worker.index].opened += 1
        listener.stat.rows[worker.index].closed[<int> CLOSE_LOCAL_EXHAUSTED] += 1
        worker.engine.no_cluster.rows[worker.index].opened += 1
        worker.engine.no_cluster.rows[worker.index].closed[<int> CLOSE_LOCAL_EXHAUSTED] += 1
        socket_close(fd, True)
        return False
    conn.side[DOWNSTREAM].fd = fd
    conn.side[DOWNSTREAM].flags = SIDE_NODELAY
    conn.side[UPSTREAM].fd = -1
    conn.accepted_ns = worker.now_ns
    conn.active_ms = worker.now_ms
    conn.listener_stat = listener.stat
    conn.listener_flags = listener.flags
    conn.cluster_stat = worker.engine.no_cluster
    address_from_sockaddr(&conn.source, storage)
    conn.state = CONN_PREFACE
    worker.accepted += 1
    worker.active += 1
    add(&worker.engine.active, 1)
    listener.stat.rows[worker.index].opened += 1
    if add(&listener.stat.active, 1) >= listener.max_connections and listener.max_connections:
        conn_refuse(worker, conn, slot, CLOSE_LIMIT_LISTENER)
    elif not conn_destination(conn, listener):
        conn_refuse(worker, conn, slot, CLOSE_NO_ORIGINAL_DESTINATION)
    elif listener.flags & (LISTENER_REDIRECT | LISTENER_TPROXY) and plan_is_own(worker.plan, &conn.destination):
        conn_refuse(worker, conn, slot, CLOSE_SELF_CALL)
    elif aside:
        conn.state = CONN_ASIDE
        worker.put_aside += 1
        lanes_push(worker, conn, slot, QUEUED_ASIDE)
    else:
        conn_begin(worker, conn, slot, listener)
    return True


cdef void conn_begin(worker_t *worker, conn_t *conn, uint32_t slot, const listener_t *listener) noexcept nogil:
    # Waits for a PROXY header where one is due.
    if prefixes_hold(worker.plan, listener.proxy_from, listener.proxy_from_end, conn.source.ip):
        conn_arm(worker, conn, slot, worker.now_ms + listener.proxy_timeout_ms)
        if not conn_watch(worker, conn, slot, DOWNSTREAM):
            conn_refuse(worker, conn, slot, CLOSE_LOCAL_EXHAUSTED)
    else:
        conn_admit(worker, conn, slot, listener)


cdef void lanes_serve(worker_t *worker, uint32_t most) noexcept nogil:
    # Begins or goes on with up to `most` of those whose turn it is.
    cdef const listener_t *listener
    cdef conn_t *conn
    cdef uint32_t slot, _i
    for _i in range(most):
        slot = lanes_pop(worker, &worker.lanes)
        if slot == WHEEL_NONE:
            return
        doing(worker, DOING_LANE, slot)
        conn = conn_at(worker, slot)
        if conn.state == CONN_RELAYING:
            conn_relay(worker, conn, slot)
            continue
        conn.state = CONN_PREFACE
        listener = conn_listener(worker, conn)
        if listener == NULL:
            conn_refuse(worker, conn, slot, CLOSE_NO_ROUTE)
        else:
            conn_begin(worker, conn, slot, listener)


cdef bint conn_destination(conn_t *conn, const listener_t *listener) noexcept nogil:
    # Where the client meant to go. False when a captured connection does not tell: it is refused, never guessed.
    cdef sockaddr_storage storage
    cdef socklen_t size = sizeof(storage)
    cdef int fd = conn.side[DOWNSTREAM].fd
    cdef int rc
    if listener.flags & LISTENER_REDIRECT:
        rc = getsockopt(
            fd, SOL_IP if address_is_v4(&listener.address) else SOL_IPV6, L4_SO_ORIGINAL_DST, &storage, &size
        )
    elif listener.flags & (LISTENER_TPROXY | LISTENER_WILDCARD):
        # With IP_TRANSPARENT the socket's own address is the destination; conntrack is not asked, its entry may be another's.
        rc = getsockname(fd, <sockaddr *> &storage, &size)
    else:
        conn.destination = listener.address
        return True
    if rc != 0:
        return False
    address_from_sockaddr(&conn.destination, &storage)
    return True


cdef const listener_t *conn_listener(const worker_t *worker, const conn_t *conn) noexcept nogil:
    # The listener of this generation, or NULL when a reload has removed it.
    cdef uint32_t i
    for i in range(worker.plan.n_listeners):
        if worker.plan.listeners[i].stat == conn.listener_stat:
            return &worker.plan.listeners[i]
    return NULL


cdef void conn_unreadable(worker_t *worker, conn_t *conn, uint32_t slot, int error) noexcept nogil:
    # A look at the client's first bytes failed.
    conn.errno_seen = error
    conn_finish(worker, conn, slot, CLOSE_LOCAL_EXHAUSTED if is_shortage(error) else CLOSE_DOWNSTREAM_RESET, True)


cdef void conn_preface(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    # Waits for a whole PROXY header, looking at the queue without taking from it, so that nothing after it is touched.
    cdef const listener_t *listener
    cdef ssize_t n = recv(conn.side[DOWNSTREAM].fd, worker.scratch, PROXY_MAX, MSG_PEEK)
    cdef int header
    if n < 0:
        if errno != EAGAIN and errno != EINTR:
            conn_unreadable(worker, conn, slot, errno)
        return
    header = proxy_parse(worker.scratch, <uint32_t> n, &conn.source, &conn.destination)
    if header == PROXY_PARTIAL and n and not conn.side[DOWNSTREAM].flags & SIDE_FIN_SEEN:
        return
    if header < 0:
        conn_refuse(worker, conn, slot, CLOSE_PROXY_PROTOCOL_INVALID)
        return
    recv(conn.side[DOWNSTREAM].fd, worker.scratch, <size_t> header, 0)
    listener = conn_listener(worker, conn)
    if listener == NULL:
        conn_refuse(worker, conn, slot, CLOSE_NO_ROUTE)
    else:
        conn_admit(worker, conn, slot, listener)


# -- admit -------------------------------------------------------------------------------------------------------------------

cdef void conn_refuse(worker_t *worker, conn_t *conn, uint32_t slot, int reason) noexcept nogil:
    conn_finish(worker, conn, slot, reason, True)


cdef bint rate_allows_key(
    worker_t *worker, const rate_t *rate, uint64_t scope, int kind, uint64_t key, uint64_t now_ns
) noexcept nogil:
    # `scope`: id of the listener, 0 for the process; `kind` tells sources from workloads from identities.
    if rate.interval_ns == 0:
        return True
    return arrival_take(worker.engine.arrivals, key ^ mix64(scope * RATE_KINDS + <uint64_t> kind + 1), rate, now_ns)


cdef bint conn_is_in_time(worker_t *worker, conn_t *conn, const listener_t *listener) noexcept nogil:
    # The rates that are looked at before TLS. Those of the fewest come first, so that one source over its own takes nothing of what
    # is for all.
    cdef const rates_t *process = &worker.plan.arrival_rates
    cdef const rates_t *own = &listener.arrival_rates
    cdef uint64_t now_ns = clock_ns(CLOCK_MONOTONIC)
    # By a secret, so that nobody can choose an address that uses up another's.
    cdef uint64_t source = address_hash_ip(&conn.source, worker.engine.seed)
    cdef uint64_t scope = listener.stat.id
    cdef const workload_t *workload = NULL
    if not (
        rate_allows_key(worker, &own.source, scope, RATE_SOURCE, source, now_ns)
        and rate_allows_key(worker, &process.source, 0, RATE_SOURCE, source, now_ns)
    ):
        return False
    if own.workload.interval_ns or process.workload.interval_ns:
        workload = plan_workload(worker.plan, conn.source.ip)
    if workload != NULL and not (
        rate_allows_key(worker, &own.workload, scope, RATE_WORKLOAD, workload.id, now_ns)
        and rate_allows_key(worker, &process.workload, 0, RATE_WORKLOAD, workload.id, now_ns)
    ):
        return False
    if own.total.interval_ns and not rate_take(&conn.listener_stat.arrival_ns, &own.total, now_ns):
        return False
    return process.total.interval_ns == 0 or rate_take(&worker.engine.arrival_ns, &process.total, now_ns)


cdef bint conn_peer_is_in_time(worker_t *worker, const conn_t *conn) noexcept nogil:
    # The rates by identity, once the downstream's is known.
    cdef const listener_t *listener = conn_listener(worker, conn)
    cdef const tls_t *tls = conn.side[DOWNSTREAM].tls
    cdef uint64_t now_ns = clock_ns(CLOCK_MONOTONIC)
    cdef uint64_t key
    if tls.peer == NULL:
        return True
    key = fnv(tls.peer, tls.peer_length)
    return (
        listener == NULL
        or rate_allows_key(worker, &listener.arrival_rates.identity, listener.stat.id, RATE_IDENTITY, key, now_ns)
    ) and rate_allows_key(worker, &worker.plan.arrival_rates.identity, 0, RATE_IDENTITY, key, now_ns)


cdef int listener_tls_mode(const plan_t *plan, const listener_t *listener, uint16_t port) noexcept nogil:
    # A TLS_MODE_*: the port's own, or the listener's. Where the server speaks first no byte of the client's can be waited for, so
    # that permissive means plaintext there.
    cdef int mode = listener.tls_mode
    if ports_hold(plan, listener.strict, port):
        mode = TLS_MODE_STRICT
    elif ports_hold(plan, listener.permissive, port):
        mode = TLS_MODE_PERMISSIVE
    elif ports_hold(plan, listener.plain, port):
        mode = TLS_MODE_OFF
    if mode == TLS_MODE_PERMISSIVE and ports_hold(plan, listener.server_first, port):
        return TLS_MODE_OFF
    return mode


cdef void conn_admit(worker_t *worker, conn_t *conn, uint32_t slot, const listener_t *listener) noexcept nogil:
    # Limits; then the first bytes, where they decide something; then the route.
    cdef const plan_t *plan = worker.plan
    cdef int64_t limit = plan.max_connections_per_source
    cdef bint lowered = overload_source_limit(worker, &limit)
    if listener.rated and not conn_is_in_time(worker, conn, listener):
        conn_refuse(worker, conn, slot, CLOSE_LIMIT_RATE)
        return
    if limit and not source_take(worker.engine.sources, &conn.source, limit, &conn.source_count):
        worker.shed[<int> SHED_SOURCE] += lowered
        conn_refuse(worker, conn, slot, CLOSE_OVERLOAD if lowered else CLOSE_LIMIT_SOURCE)
        return
    conn.tls_mode = <uint8_t> listener_tls_mode(plan, listener, conn.destination.port)
    if (
        conn.tls_mode == TLS_MODE_PERMISSIVE
        or (listener.flags & LISTENER_HELLO and not ports_hold(plan, listener.server_first, conn.destination.port))
    ):
        conn.state = CONN_HELLO
        conn.phase.dial.attempt_at_ms = worker.now_ms + listener.handshake_ms
        conn_arm(worker, conn, slot, worker.now_ms + listener.handshake_ms)
        if not conn.side[DOWNSTREAM].flags & SIDE_WATCHED and not conn_watch(worker, conn, slot, DOWNSTREAM):
            conn_refuse(worker, conn, slot, CLOSE_LOCAL_EXHAUSTED)
        elif conn.side[DOWNSTREAM].flags & SIDE_READABLE:
            conn_hello(worker, conn, slot, False)
        return
    conn_route(worker, conn, slot, listener, NULL)


cdef void conn_hello(worker_t *worker, conn_t *conn, uint32_t slot, bint late) noexcept nogil:
    # Looks at the first bytes without taking them. `late`: the time for them is over, and what has come has to do: a client that says
    # nothing waits for the server, in plaintext.
    cdef const listener_t *listener = conn_listener(worker, conn)
    cdef ssize_t n = recv(conn.side[DOWNSTREAM].fd, worker.scratch, SCRATCH_BYTES, MSG_PEEK)
    cdef hello_t hello
    cdef int found
    if n < 0 and errno != EAGAIN and errno != EINTR:
        conn_unreadable(worker, conn, slot, errno)
        return
    if listener == NULL:
        conn_refuse(worker, conn, slot, CLOSE_NO_ROUTE)
        return
    found = HELLO_PARTIAL
    if n > 0:
        found = hello_parse(worker.scratch, <uint32_t> n, &hello)
        conn.lane_hint = hello.lane_hint if found == HELLO_FOUND else 0
    elif n == 0:
        # A FIN without a byte: half of a close, or the end of one that the route alone can tell.
        found = HELLO_NOT_TLS
    if found == HELLO_PARTIAL:
        if n > 0 and conn.tls_mode != TLS_MODE_OFF and not listener.flags & LISTENER_HELLO and n >= 2:
            # TLS it is; OpenSSL takes the rest as it comes.
            conn_route(worker, conn, slot, listener, NULL)
        elif late and n <= 0 and conn.tls_mode != TLS_MODE_STRICT:
            conn.tls_mode = TLS_MODE_OFF
            conn_route(worker, conn, slot, listener, NULL)
        elif late or (n > 0 and conn.side[DOWNSTREAM].flags & SIDE_FIN_SEEN):
            conn_fail_hello(worker, conn, slot, TLS_TIMEOUT if late else TLS_TRUNCATED)
    elif found == HELLO_INVALID:
        conn_fail_hello(worker, conn, slot, TLS_BAD_RECORD)
    elif found == HELLO_NOT_TLS:
        if conn.tls_mode == TLS_MODE_PERMISSIVE:
            conn.tls_mode = TLS_MODE_OFF
        conn_route(worker, conn, slot, listener, NULL)
    else:
        conn_route(worker, conn, slot, listener, &hello)


cdef void conn_fail_hello(worker_t *worker, conn_t *conn, uint32_t slot, int cause) noexcept nogil:
    conn.tls_cause = <uint8_t> cause
    worker.tls_failures[DOWNSTREAM][<int> cause] += 1
    conn_finish(worker, conn, slot, CLOSE_DOWNSTREAM_TLS, False)


cdef void conn_route(
    worker_t *worker, conn_t *conn, uint32_t slot, const listener_t *listener, const hello_t *hello
) noexcept nogil:
    # To a cluster; then TLS with the downstream where it is due.
    cdef const plan_t *plan = worker.plan
    cdef int32_t index = route_find(plan, listener, &conn.destination, &conn.source, hello, worker_random(worker))
    cdef cluster_t *cluster
    if index < 0:
        conn_refuse(worker, conn, slot, CLOSE_NO_ROUTE)
        return
    cluster = plan.clusters[index]
    cluster_hold(cluster)
    memset(&conn.phase.dial, 0, sizeof(dial_t))
    conn.phase.dial.cluster = cluster
    conn.phase.dial.last_reason = CLOSE_NO_ENDPOINT
    conn.routed = 1
    if plan.faults != NULL:
        conn_choose_fault(worker, conn, listener, hello, index)
    if conn.tls_mode == TLS_MODE_OFF:
        conn_enter(worker, conn, slot)
    else:
        conn_secure(worker, conn, slot, listener)


cdef void conn_enter(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    # Into the cluster, and on to the first dial.
    cdef cluster_t *cluster = conn.phase.dial.cluster
    conn.cluster_stat = <cluster_stat_t *> cluster.stat
    conn.cluster_stat.rows[worker.index].opened += 1
    if cluster.settings.queue_size:
        conn_line_up(worker, conn, slot)
        return
    conn.state = CONN_DIALLING
    if (
        add(&conn.cluster_stat.active, 1) >= cluster.settings.max_connections
        and cluster.settings.max_connections
    ):
        conn_refuse(worker, conn, slot, CLOSE_LIMIT_CLUSTER)
        return
    conn_set_out(worker, conn, slot)


cdef void conn_set_out(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    # It has its place.
    cdef cluster_t *cluster = conn.phase.dial.cluster
    conn.state = CONN_DIALLING
    conn.phase.dial.deadline_ms = worker.now_ms + cluster.settings.connect_budget_ms
    conn_copy_settings(worker, conn, &cluster.settings)
    if conn.shaping != NULL and conn_inject(worker, conn, slot):
        return
    conn_recall_end(worker, conn, slot)
    conn_dial(worker, conn, slot)


# -- wait for a place --------------------------------------------------------------------------------------------------------

cdef bint conn_take_place(worker_t *worker, conn_t *conn) noexcept nogil:
    # In the cluster and at one of its endpoints: both or none. False: last_reason says what there is none of.
    cdef dial_t *dial = &conn.phase.dial
    cdef int64_t most = dial.cluster.settings.max_connections
    if most and load(&conn.cluster_stat.active) >= most:
        dial.last_reason = CLOSE_LIMIT_CLUSTER
        return False
    if not dial_pick(worker, conn):
        return False
    if not place_take(&conn.cluster_stat.active, most):
        dial_give_place(worker, conn)
        dial.last_reason = CLOSE_LIMIT_CLUSTER
        return False
    dial.picked = 1
    return True


cdef void conn_line_up(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    # Into a cluster whose connections wait for a place where others are refused: goes on at once if there is one and nobody waits here.
    cdef dial_t *dial = &conn.phase.dial
    cdef const cluster_settings_t *settings = &dial.cluster.settings
    cdef bint first = conn.cluster_stat.rows[worker.index].line == NULL
    cdef int64_t before
    if first and conn_take_place(worker, conn):
        conn_set_out(worker, conn, slot)
        return
    conn.state = CONN_QUEUED
    before = add_ordered(&conn.cluster_stat.waiting, 1)
    if first and dial.last_reason == CLOSE_NO_ENDPOINT:
        conn_refuse(worker, conn, slot, CLOSE_NO_ENDPOINT)
    elif before >= settings.queue_size:
        if settings.max_connections and load(&conn.cluster_stat.active) >= settings.max_connections:
            conn_refuse(worker, conn, slot, CLOSE_LIMIT_CLUSTER)
        else:
            conn_refuse(worker, conn, slot, CLOSE_LIMIT_ENDPOINT)
    elif not line_join(worker, conn, slot):
        conn_refuse(worker, conn, slot, CLOSE_LOCAL_EXHAUSTED)
    elif not conn.side[DOWNSTREAM].flags & SIDE_WATCHED and not conn_watch(worker, conn, slot, DOWNSTREAM):
        conn_refuse(worker, conn, slot, CLOSE_LOCAL_EXHAUSTED)
    else:
        dial.attempt_started_ns = worker.now_ns
        dial.attempt_at_ms = worker.now_ms + settings.queue_timeout_ms
        conn_arm(worker, conn, slot, dial.attempt_at_ms)
        conn_recall_end(worker, conn, slot)
        if first:
            fence()
            line_serve(worker, conn.cluster_stat)


cdef void line_serve(worker_t *worker, cluster_stat_t *stat) noexcept nogil:
    # Those that wait set out, in the order in which they came, as far as there are places.
    cdef cluster_row_t *row = &stat.rows[worker.index]
    cdef conn_t *conn
    cdef uint32_t slot
    while row.line != NULL:
        slot = (<waiting_t *> row.line).queue.head
        doing(worker, DOING_LINE, slot)
        conn = conn_at(worker, slot)
        if conn_take_place(worker, conn):
            conn_book_wait(worker, conn)
            line_leave(worker, conn)
            conn_set_out(worker, conn, slot)
        elif conn.phase.dial.last_reason == CLOSE_NO_ENDPOINT:
            conn_finish(worker, conn, slot, CLOSE_NO_ENDPOINT, True)
        else:
            return


cdef void conn_book_wait(worker_t *worker, conn_t *conn) noexcept nogil:
    # Before it leaves the line, served or not.
    cdef cluster_row_t *row = &conn.cluster_stat.rows[worker.index]
    cdef uint64_t waited_ns = worker.now_ns - conn.phase.dial.attempt_started_ns
    cdef uint64_t waited_ms = waited_ns // 1000000
    conn.queued_ms = <uint16_t> (65535 if waited_ms > 65535 else waited_ms if waited_ms else 1)
    row.queued += 1
    row.queued_ns += waited_ns


cdef void worker_serve_lines(worker_t *worker) noexcept nogil:
    cdef waiting_t *line = worker.lines
    cdef waiting_t *following
    worker.serving = 0
    while line != NULL:
        # Serving a line may free it, and no other.
        following = line.next
        exchange(&line.stat.rows[worker.index].offered, 0)
        line_serve(worker, line.stat)
        line = following


cdef void worker_adopt_lines(worker_t *worker) noexcept nogil:
    # What waits goes over to the new plan's clusters, which may have other limits and endpoints.
    cdef const plan_t *plan = worker.plan
    cdef waiting_t *line = worker.lines
    cdef dial_t *dial
    cdef uint32_t i, slot
    while line != NULL:
        for i in range(plan.n_clusters):
            if plan.clusters[i].stat == line.stat:
                break
        else:
            line = line.next
            continue
        slot = line.queue.head
        while slot != WHEEL_NONE:
            dial = &conn_at(worker, slot).phase.dial
            cluster_hold(plan.clusters[i])
            cluster_drop(dial.cluster)
            dial.cluster = plan.clusters[i]
            slot = conn_at(worker, slot).queue_next
        line = line.next
    worker.serving = worker.lines != NULL


# -- injected faults ---------------------------------------------------------------------------------------------------------

cdef void conn_choose_fault(
    worker_t *worker, conn_t *conn, const listener_t *listener, const hello_t *hello, int32_t cluster
) noexcept nogil:
    # After the route: by its rules, then by the cluster's. Without memory there is no fault.
    cdef const plan_t *plan = worker.plan
    cdef uint32_t route = route_match(plan, listener, &conn.destination, &conn.source, hello)
    cdef const fault_t *fault
    cdef span_t of_route
    memset(&of_route, 0, sizeof(of_route))
    if route:
        of_route = plan.routes[route - 1].faults
    fault = fault_choose(plan, of_route, plan.cluster_faults[cluster], conn.source.ip, worker_random(worker))
    if fault != NULL and shaping_open(conn) != NULL:
        conn.shaping.fault = fault[0]


cdef void conn_injected(worker_t *worker, conn_t *conn) noexcept nogil:
    conn.shaping.injected = 1
    conn.cluster_stat.rows[worker.index].faults[<int> conn.shaping.fault.kind] += 1


cdef bint conn_inject(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    # What comes before the dial. True: the connection waits, or has ended. While it waits it is DIALLING without an attempt.
    cdef shaping_t *shaping = conn.shaping
    cdef int kind = shaping.fault.kind
    if kind == FAULT_REFUSE:
        conn_injected(worker, conn)
        conn_refuse(worker, conn, slot, CLOSE_FAULT)
        return True
    if kind != FAULT_DELAY and kind != FAULT_BLACK_HOLE:
        return False
    conn_injected(worker, conn)
    shaping.until_ms = worker.now_ms + fault_time_ms(&shaping.fault, worker_random(worker))
    if shaping.fault.from_ms == 0:
        # A black hole until the client gives up, as it may without a word.
        shaping.until_ms = worker.now_ms + conn.idle_ms if conn.idle_ms else <uint64_t> -1
    if not conn.side[DOWNSTREAM].flags & SIDE_WATCHED and not conn_watch(worker, conn, slot, DOWNSTREAM):
        conn_refuse(worker, conn, slot, CLOSE_LOCAL_EXHAUSTED)
    else:
        if shaping.until_ms != <uint64_t> -1:
            conn_arm(worker, conn, slot, shaping.until_ms)
        conn_recall_end(worker, conn, slot)
    return True


cdef void conn_inject_timeout(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    # The wait of conn_inject, looked at by its timer.
    cdef shaping_t *shaping = conn.shaping
    if worker.now_ms < shaping.until_ms:
        if shaping.until_ms != <uint64_t> -1:
            conn_arm(worker, conn, slot, shaping.until_ms)
    elif shaping.fault.kind == FAULT_BLACK_HOLE:
        conn_finish(worker, conn, slot, CLOSE_FAULT, True)
    else:
        shaping.until_ms = 0
        conn.phase.dial.deadline_ms = worker.now_ms + conn.phase.dial.cluster.settings.connect_budget_ms
        conn_dial(worker, conn, slot)


cdef void conn_inject_half_closed(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    # In a black hole, a client that has sent something and ended may be gone, or wait for its answer: bounded as in the relay.
    cdef shaping_t *shaping = conn.shaping
    if shaping.fault.kind == FAULT_BLACK_HOLE and conn.half_closed_ms and worker.now_ms + conn.half_closed_ms < shaping.until_ms:
        shaping.until_ms = worker.now_ms + conn.half_closed_ms
        conn_arm(worker, conn, slot, shaping.until_ms)


cdef void conn_break(worker_t *worker, conn_t *conn, uint32_t slot, int side) noexcept nogil:
    # Ends the connection as if this side had reset it: what it had sent until now has been handed over and is still delivered.
    conn_injected(worker, conn)
    queue_remove(worker, conn)
    half_drop(worker, &conn.phase.half[DOWNSTREAM])
    half_drop(worker, &conn.phase.half[UPSTREAM])
    conn.end_reason = CLOSE_FAULT
    conn.state = CONN_RESETTING
    conn.first_end = <uint8_t> side
    conn.linger_ms = 1
    conn.ends_at_ms = worker.now_ms + (conn.half_closed_ms if conn.half_closed_ms else RESET_LIMIT_MS)
    conn_drain(worker, conn, slot)


# -- bandwidth ---------------------------------------------------------------------------------------------------------------

cdef bint conn_shape(worker_t *worker, conn_t *conn, const cluster_settings_t *settings) noexcept nogil:
    # Connected: what limits its halves, and faults that begin now. False: no memory.
    cdef const plan_t *plan = worker.plan
    cdef const workload_t *source = plan_workload(plan, conn.source.ip)
    cdef const workload_t *target = plan_workload(plan, conn.endpoint.ip)
    cdef const listener_t *listener = conn_listener(worker, conn)
    cdef const fault_t *fault = &conn.shaping.fault if conn.shaping != NULL else NULL
    cdef bucket_t *from_source
    cdef bucket_t *to_target
    cdef uint64_t rate, burst
    cdef lane_t *lane
    cdef int h
    for h in range(2):
        rate = settings.rates[h]
        burst = settings.burst
        if listener != NULL and listener.rates[h] and (rate == 0 or listener.rates[h] < rate):
            rate = listener.rates[h]
            burst = listener.burst
        if fault != NULL and fault.kind == FAULT_SLOW and (rate == 0 or fault.rate < rate):
            rate = fault.rate
            burst = 0
        # A workload's buckets are of what comes in and what goes out.
        from_source = source.buckets[1 - h] if source != NULL else NULL
        to_target = target.buckets[h] if target != NULL else NULL
        if rate == 0 and from_source == NULL and to_target == NULL:
            continue
        if shaping_open(conn) == NULL:
            return False
        lane = &conn.shaping.lanes[h]
        if rate:
            bucket_set(&lane.own, rate, burst, bucket_quantum(rate, OWN_PER_S, OWN_QUANTUM_MIN))
        lane_share(lane, from_source)
        lane_share(lane, to_target)
    if fault != NULL and fault.kind == FAULT_SLOW:
        conn_injected(worker, conn)
    elif fault != NULL and fault.kind == FAULT_STALL and fault.bytes == 0:
        conn_stall(worker, conn)
    elif fault != NULL and fault.kind == FAULT_RESET and fault.bytes == 0:
        conn.shaping.until_ms = worker.now_ms + fault_time_ms(fault, worker_random(worker))
    return True


cdef void conn_stall(worker_t *worker, conn_t *conn) noexcept nogil:
    conn_injected(worker, conn)
    conn.shaping.until_ms = worker.now_ms + fault_time_ms(&conn.shaping.fault, worker_random(worker))


cdef bint conn_shaped(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    # RELAYING and RESETTING, when the halves have gone as far as they may. True: a fault has changed the state.
    cdef int h = conn.shaping.fault.half
    cdef const tls_t *tls = conn.side[1 - h].tls
    cdef uint64_t at
    if shaping_is_due(conn, h):
        if conn.shaping.fault.kind == FAULT_STALL:
            conn_stall(worker, conn)
        elif tls == NULL or tls.out_length == 0:
            conn_break(worker, conn, slot, h)
            return True
    at = shaping_next_ms(worker, conn)
    if at:
        conn_arm(worker, conn, slot, at)
    return False


cdef bint conn_shaping_timeout(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    # RELAYING: a turn may have come, or the end of a stall. True: the connection does not relay any more.
    cdef shaping_t *shaping = conn.shaping
    if shaping.until_ms and worker.now_ms >= shaping.until_ms:
        shaping.until_ms = 0
        if shaping.fault.kind == FAULT_RESET:
            conn_injected(worker, conn)
            conn_finish(worker, conn, slot, CLOSE_FAULT, True)
            return True
    conn_relay(worker, conn, slot)
    if conn.state != CONN_RELAYING:
        return True
    if shaping_waits(worker, conn):
        # It is we who make it wait: it is not idle. One that is stalled is: so is one whose peer is silent.
        conn.active_ms = worker.now_ms
    return False


# -- downstream TLS ----------------------------------------------------------------------------------------------------------

cdef const workload_t *plan_workload(const plan_t *plan, const uint8_t *ip) noexcept nogil:
    # The workload of this node that has the address, or NULL.
    cdef address_t address
    cdef uint32_t at
    if plan.workload_mask == 0:
        return NULL
    memcpy(address.ip, ip, 16)
    at = <uint32_t> address_hash_ip(&address, 0) & plan.workload_mask
    while plan.workloads[at].taken:
        if memcmp(plan.workloads[at].ip, ip, 16) == 0:
            return &plan.workloads[at]
        at = (at + 1) & plan.workload_mask
    return NULL


cdef bint workload_identity(const plan_t *plan, const workload_t *workload, spiffe_t *identity) noexcept nogil:
    # Who a workload of this node is (NULL: none). False, and `identity` as it was: it has no certificate.
    cdef const tls_context_t *context = NULL
    if workload != NULL and workload.identity < plan.n_contexts:
        context = plan.contexts[workload.identity]
    return context != NULL and spiffe_parse(context.identity, context.identity_length, identity)


cdef const tls_context_t *plan_context(const plan_t *plan, uint32_t configured, const uint8_t *ip) noexcept nogil:
    # The identity to show: the configured one, that of the workload at the address, the node's. NULL: there is none.
    cdef const workload_t *workload
    cdef uint32_t identity = configured
    if identity == 0:
        workload = plan_workload(plan, ip)
        identity = workload.identity if workload != NULL else plan.node_identity
    return plan.contexts[identity] if identity < plan.n_contexts else NULL


cdef void conn_secure(worker_t *worker, conn_t *conn, uint32_t slot, const listener_t *listener) noexcept nogil:
    # Begins the handshake with the downstream.
    cdef const plan_t *plan = worker.plan
    cdef const tls_context_t *context = plan_context(plan, listener.identity, conn.destination.ip)
    if context == NULL:
        conn_refuse(worker, conn, slot, CLOSE_NO_IDENTITY)
        return
    if plan.max_handshakes_per_source and not source_take(
        worker.engine.handshakes, &conn.source, plan.max_handshakes_per_source, &conn.handshake_count
    ):
        conn_refuse(worker, conn, slot, CLOSE_LIMIT_HANDSHAKES)
        return
    if not tls_open(worker, &conn.side[DOWNSTREAM], context, True, listener.tls_v12, listener.resumption, NULL):
        conn_refuse(worker, conn, slot, CLOSE_LOCAL_EXHAUSTED)
        return
    conn.close_expired = listener.close_expired
    conn.state = CONN_HANDSHAKE
    conn.side[DOWNSTREAM].flags |= SIDE_WRITABLE
    conn_arm(worker, conn, slot, worker.now_ms + listener.handshake_ms)
    conn.phase.dial.attempt_at_ms = worker.now_ms + listener.handshake_ms
    if not conn.side[DOWNSTREAM].flags & SIDE_WATCHED:
        if not conn_watch(worker, conn, slot, DOWNSTREAM):
            conn_refuse(worker, conn, slot, CLOSE_LOCAL_EXHAUSTED)
    else:
        conn.side[DOWNSTREAM].flags |= SIDE_READABLE
        conn_push_handshake(worker, conn, slot)


cdef void conn_push_handshake(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    # HANDSHAKE: there is something for the next step of it. Where others wait for theirs, it is worth a look whose first one it is.
    cdef hello_t hello
    cdef ssize_t n
    if worker.heavy.n >= LANE_DIRECT and not conn.queued and not conn.side[DOWNSTREAM].tls.flags & TLS_HEARD:
        n = recv(conn.side[DOWNSTREAM].fd, worker.scratch, SCRATCH_BYTES, MSG_PEEK)
        if n > 0 and hello_parse(worker.scratch, <uint32_t> n, &hello) == HELLO_FOUND:
            conn.lane_hint = hello.lane_hint
    lanes_push(worker, conn, slot, QUEUED_HEAVY)


cdef void conn_handshake(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    # HANDSHAKE: as far as it goes.
    cdef side_t *side = &conn.side[DOWNSTREAM]
    cdef int done = tls_handshake(worker, side, &conn.errno_seen)
    conn.lane_hint = side.tls.lane_hint
    if done == HANDSHAKE_DONE:
        conn_secured(worker, conn, DOWNSTREAM)
        if worker.plan.rates_identities and not conn_peer_is_in_time(worker, conn):
            conn_refuse(worker, conn, slot, CLOSE_LIMIT_RATE)
        else:
            conn_enter(worker, conn, slot)
    elif done == HANDSHAKE_FAILED:
        if side.tls.cause == TLS_OK or (side.tls.cause == TLS_TRUNCATED and not side.tls.flags & TLS_HEARD):
            # A port scan, a health check, a client that changed its mind.
            conn_finish(worker, conn, slot, CLOSE_DOWNSTREAM_LEFT, True)
        else:
            # Not a reset: the alert that says why is on its way.
            worker.tls_failures[DOWNSTREAM][<int> side.tls.cause] += 1
            conn_finish(
                worker, conn, slot, CLOSE_LOCAL_EXHAUSTED if side.tls.cause == TLS_INTERNAL else CLOSE_DOWNSTREAM_TLS, False
            )


cdef void conn_secured(worker_t *worker, conn_t *conn, int side) noexcept nogil:
    # The peer of this side is known.
    cdef tls_t *tls = conn.side[side].tls
    cdef int64_t left_s
    cdef uint64_t left_ms, spread_ms
    worker.handshakes[side][1 if tls.flags & TLS_RESUMED else 0] += 1
    if side == DOWNSTREAM and conn.handshake_count != NULL:
        source_give(worker.engine.handshakes, conn.handshake_count)
        conn.handshake_count = NULL
    if conn.close_expired:
        # Spread after the end, so that connections made under one certificate don't all come back together: over a tenth of what is
        # left of it now, and over no more than a minute.
        left_s = tls.peer_expires_s - unix_seconds()
        left_ms = <uint64_t> left_s * 1000 if left_s > 0 else 0
        spread_ms = left_ms // 10 if left_ms < 10 * EXPIRY_SPREAD_MS else EXPIRY_SPREAD_MS
        left_ms += worker.now_ms + worker_random(worker) % (spread_ms + 1)
        conn_end_by(conn, left_ms, CLOSE_PEER_CERTIFICATE)


# -- authorize ---------------------------------------------------------------------------------------------------------------

cdef bint conn_authorize(worker_t *worker, conn_t *conn, const workload_t *workload) noexcept nogil:
    # Whether the policies of where the connection goes let this peer in. The destination is `workload`, which has the endpoint's
    # address; else, for what comes in to this node, the one that has the original destination's. What leaves the node is judged
    # where it arrives.
    cdef const plan_t *plan = worker.plan
    cdef const policy_set_t *policies
    cdef uint16_t port = conn.endpoint.port if workload != NULL else conn.destination.port
    cdef const tls_t *tls = conn.side[DOWNSTREAM].tls
    cdef verdict_t verdict
    cdef spiffe_t peer
    conn.policy = 0
    conn.dry_policy = 0
    if plan.policy_sets == NULL:
        return True
    if workload == NULL:
        if conn.listener_flags & LISTENER_OUTBOUND:
            return True
        workload = plan_workload(plan, conn.destination.ip)
    policies = &plan.policy_sets[workload.policies if workload != NULL else plan.default_policies]
    memset(&peer, 0, sizeof(peer))
    if tls != NULL and tls.peer != NULL:
        spiffe_parse(tls.peer, tls.peer_length, &peer)
    elif conn.listener_flags & LISTENER_OUTBOUND:
        # One hop within the node: the kernel vouches for the source address, and the address for the workload.
        workload_identity(plan, plan_workload(plan, conn.source.ip), &peer)
    verdict_find(plan, policies, &peer, &conn.source, port, &verdict)
    if verdict_allows(policies, &verdict) and not verdict_would_allow(policies, &verdict):
        worker.dry_denied += 1
        conn.dry_policy = plan.clauses[verdict.dry_deny].policy if verdict.dry_deny >= 0 else <uint32_t> -1
    if verdict.deny >= 0:
        conn.policy = plan.clauses[verdict.deny].policy
    elif verdict.allow >= 0:
        conn.policy = plan.clauses[verdict.allow].policy
    return verdict_allows(policies, &verdict)


cdef bint conn_still_trusted(worker_t *worker, conn_t *conn, int *reason) noexcept nogil:
    # After a change of policies or revocations: may a live connection go on? Policies are asked of one that waits when it dials.
    cdef int side
    for side in range(2):
        if conn.side[side].tls != NULL and conn.side[side].tls.peer != NULL:
            if plan_revokes_chain(worker.plan, conn.side[side].tls):
                conn.side[side].tls.cause = TLS_REVOKED
                reason[0] = CLOSE_PEER_CERTIFICATE
                return False
    reason[0] = CLOSE_DENIED
    return (
        conn.state == CONN_QUEUED or (conn.state == CONN_DIALLING and conn.attempts == 0)
        or conn_authorize(worker, conn, plan_workload(worker.plan, conn.endpoint.ip))
    )


cdef inline uint32_t clamp_ms(uint64_t ms) noexcept nogil:
    return <uint32_t> -1 if ms > <uint32_t> -1 else <uint32_t> ms


cdef void conn_copy_settings(worker_t *worker, conn_t *conn, const cluster_settings_t *settings) noexcept nogil:
    # What the connection needs after the plan is gone.
    cdef uint64_t jitter
    conn.idle_ms = clamp_ms(settings.idle_timeout_ms)
    conn.half_closed_ms = clamp_ms(settings.half_closed_timeout_ms)
    conn.user_timeout_ms = settings.user_timeout_ms
    conn.keepalive_idle_s = <uint16_t> settings.keepalive_idle_s
    conn.keepalive_interval_s = <uint16_t> settings.keepalive_interval_s
    conn.keepalive_count = <uint8_t> settings.keepalive_count
    conn.proxy_protocol = settings.proxy_protocol
    if settings.lifetime_ms:
        # Shortened by chance, so that connections opened together don't all come back together.
        jitter = settings.lifetime_ms * settings.lifetime_jitter_permille // 1000
        conn_end_by(conn, worker.now_ms + settings.lifetime_ms - (worker_random(worker) % jitter if jitter else 0), CLOSE_LIFETIME)


# -- dial --------------------------------------------------------------------------------------------------------------------

cdef bint dial_was_tried(const conn_t *conn, uint32_t index) noexcept nogil:
    cdef uint32_t i
    for i in range(conn.attempts):
        if conn.phase.dial.tried[i] == index:
            return True
    return False


cdef inline pick_t dial_wish(worker_t *worker, conn_t *conn) noexcept nogil:
    # What a pick goes by.
    cdef pick_t pick
    memset(&pick, 0, sizeof(pick))
    pick.source_hash = address_hash_ip(&conn.source, 0)
    pick.random = &worker.random
    pick.cursor = &conn.cluster_stat.rows[worker.index].cursor
    pick.tried = conn.phase.dial.tried
    pick.n_tried = conn.attempts
    # One that waits for a place, or looks for one, is not counted yet.
    pick.others = <uint64_t> (load(&conn.cluster_stat.active) - (conn.state == CONN_DIALLING))
    pick.panic = load(&conn.cluster_stat.panic) != 0
    return pick


cdef bint dial_has_untried(worker_t *worker, conn_t *conn) noexcept nogil:
    # Whether an endpoint serves that this connection has not dialled, full or not.
    cdef pick_t pick = dial_wish(worker, conn)
    return cluster_has_untried(conn.phase.dial.cluster, &pick)


cdef bint dial_pick(worker_t *worker, conn_t *conn) noexcept nogil:
    # Chooses the next endpoint and counts it as active. False: none is left, and last_reason says why.
    cdef dial_t *dial = &conn.phase.dial
    cdef cluster_t *cluster = dial.cluster
    cdef const endpoint_t *endpoint
    cdef pick_t pick
    cdef int32_t index
    if cluster.settings.original_destination:
        if conn.attempts and dial.last_reason != CLOSE_CONNECT_TIMEOUT and not cluster.settings.backoff_ms:
            return False
        conn.endpoint = conn.destination
        conn.endpoint_stat = NULL
        return True
    pick = dial_wish(worker, conn)
    while True:
        index = cluster_pick(cluster, &pick, worker.now_ms)
        if index < 0:
            if conn.attempts == 0:
                dial.last_reason = CLOSE_LIMIT_ENDPOINT if index == PICK_FULL else CLOSE_NO_ENDPOINT
            return False
        # Only a lost SYN is worth a second try at the same endpoint at once; a refusal would come again.
        if dial.last_reason != CLOSE_CONNECT_TIMEOUT and not cluster.settings.backoff_ms and dial_was_tried(conn, <uint32_t> index):
            return False
        endpoint = &cluster.endpoints[index]
        # Else another worker took its last place meanwhile: there may be one elsewhere.
        if place_take(&endpoint.stat.active, cluster.settings.max_connections_per_endpoint):
            break
    conn.endpoint_stat = endpoint.stat
    conn.endpoint = endpoint.address
    dial.tried[conn.attempts] = <uint32_t> index
    return True


cdef bint local_peer_is_expected(const worker_t *worker, const conn_t *conn) noexcept nogil:
    # Within the node no handshake shows who the endpoint is; its address says which workload it is.
    cdef spiffe_t peer
    if not workload_identity(worker.plan, plan_workload(worker.plan, conn.endpoint.ip), &peer):
        return False
    return cluster_expects(conn.phase.dial.cluster, &peer)


cdef void conn_fail_upstream(worker_t *worker, conn_t *conn, uint32_t slot, int cause) noexcept nogil:
    conn.tls_cause = <uint8_t> cause
    worker.tls_failures[UPSTREAM][<int> cause] += 1
    conn_finish(worker, conn, slot, CLOSE_UPSTREAM_TLS, True)


cdef inline bint stays_here(const plan_t *plan, const address_t *peer) noexcept nogil:
    # What can be told without asking the kernel.
    return address_is_loopback(peer) or plan_workload(plan, peer.ip) != NULL


cdef inline void side_unpace(side_t *side) noexcept nogil:
    # Between two sockets of one host there is no link to be shared, and BBR's pacing only sets a timer for every send, which runs in
    # whatever process the CPU is in then. A socket that was connected with BBR goes on pacing after it: the kernel never takes that
    # back. So what is known to stay here is told before it connects (dial_open; listeners.py for those that we accept). Measured: of
    # what a stream costs without that, a quarter, and of what its receiver pays, often two thirds. Reno is in every kernel, and
    # nobody needs a privilege for it.
    setsockopt(side.fd, IPPROTO_TCP, TCP_CONGESTION, b"reno", 4)
    side.flags |= SIDE_TUNED


cdef bint dial_open(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    # A socket on its way to conn.endpoint, watched. False: errno_seen says why.
    cdef sockaddr_storage storage
    cdef address_t from_address = conn.source
    cdef socklen_t size = address_to_sockaddr(&conn.endpoint, &storage)
    cdef bint as_v4 = address_is_v4(&conn.endpoint)
    cdef int fd = socket(storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
    cdef int one = 1
    cdef uint32_t mark = worker.plan.mark
    if fd < 0:
        conn.errno_seen = errno
        return False
    conn.side[UPSTREAM].fd = fd
    conn.side[UPSTREAM].flags = 0
    if worker.engine.paces and stays_here(worker.plan, &conn.endpoint):
        side_unpace(&conn.side[UPSTREAM])
    if mark and setsockopt(fd, SOL_SOCKET, SO_MARK, &mark, sizeof(mark)) != 0:
        conn.errno_seen = errno
        return False
    if conn.listener_flags & LISTENER_PRESERVE_SOURCE:
        if as_v4 != address_is_v4(&conn.source):
            conn.errno_seen = EADDRNOTAVAIL
            return False
        from_address.port = 0
        if (
            setsockopt(fd, SOL_IP if as_v4 else SOL_IPV6, IP_TRANSPARENT if as_v4 else IPV6_TRANSPARENT, &one, sizeof(one)) != 0
            or setsockopt(fd, SOL_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof(one)) != 0
        ):
            conn.errno_seen = errno
            return False
        size = address_to_sockaddr(&from_address, &storage)
        if bind(fd, <sockaddr *> &storage, size) != 0:
            conn.errno_seen = errno
            return False
        size = address_to_sockaddr(&conn.endpoint, &storage)
    if connect(fd, <sockaddr *> &storage, size) != 0 and errno != EINPROGRESS:
        conn.errno_seen = errno
        return False
    if not conn_watch(worker, conn, slot, UPSTREAM):
        conn.errno_seen = errno
        return False
    return True


cdef int dial_reason(int error) noexcept nogil:
    # What a failed attempt is called. Local trouble is never the endpoint's fault (invariant 12).
    if error == ECONNREFUSED:
        return CLOSE_CONNECT_REFUSED
    if error == ETIMEDOUT:
        return CLOSE_CONNECT_TIMEOUT
    if error == EHOSTUNREACH or error == ENETUNREACH or error == EHOSTDOWN or error == ENONET or error == ENETDOWN:
        return CLOSE_CONNECT_UNREACHABLE
    if (
        error == EADDRNOTAVAIL or error == EADDRINUSE or error == EMFILE or error == ENFILE or error == ENOBUFS
        or error == ENOMEM or error == ENOSPC or error == EACCES or error == EPERM or error == EAGAIN
    ):
        return CLOSE_LOCAL_EXHAUSTED
    return CLOSE_CONNECT_FAILED


cdef void dial_give_place(worker_t *worker, conn_t *conn) noexcept nogil:
    # The attempt's place at the endpoint.
    if conn.endpoint_stat != NULL:
        add_ordered(&conn.endpoint_stat.active, -1)
        conn.endpoint_stat = NULL
        if load_ordered(&conn.cluster_stat.waiting):
            places_offer(worker, conn.cluster_stat)


cdef void dial_abandon(worker_t *worker, conn_t *conn) noexcept nogil:
    # Takes the attempt's socket and its place at the endpoint back, and its turn: left in the list of handshakes, a connection whose
    # next attempt needs none would come to relay with no list free for it.
    queue_remove(worker, conn)
    tls_free(&conn.side[UPSTREAM])
    conn.phase.dial.handshaking = 0
    socket_close(conn.side[UPSTREAM].fd, False)
    conn.side[UPSTREAM].fd = -1
    dial_give_place(worker, conn)


cdef void dial_failed(worker_t *worker, conn_t *conn, int error) noexcept nogil:
    # Books a failed attempt.
    cdef cluster_row_t *row = &conn.cluster_stat.rows[worker.index]
    conn.errno_seen = error
    conn.phase.dial.last_reason = <uint8_t> dial_reason(error)
    if conn.phase.dial.last_reason != CLOSE_LOCAL_EXHAUSTED:
        row.connect_failures += 1
        if conn.endpoint_stat != NULL:
            add_u(&conn.endpoint_stat.connect_failures, 1)
            conn.endpoint_stat.failing = 1
        outlier_dial_failed(worker, conn, error)
    dial_abandon(worker, conn)


cdef void dial_pause(worker_t *worker, conn_t *conn, uint32_t slot, uint32_t ms) noexcept nogil:
    # The next attempt begins then, if there is still time for it.
    cdef dial_t *dial = &conn.phase.dial
    dial.attempt_at_ms = worker.now_ms + ms
    if dial.attempt_at_ms >= dial.deadline_ms:
        conn_finish(worker, conn, slot, dial.last_reason, True)
    elif not conn.side[DOWNSTREAM].flags & SIDE_WATCHED and not conn_watch(worker, conn, slot, DOWNSTREAM):
        conn_finish(worker, conn, slot, CLOSE_LOCAL_EXHAUSTED, True)
    else:
        conn_arm(worker, conn, slot, dial.attempt_at_ms)


cdef bint dial_again(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    # Whether an attempt after the first may begin now. False: it begins later, or the connection has ended.
    cdef dial_t *dial = &conn.phase.dial
    cdef const cluster_settings_t *settings = &dial.cluster.settings
    if not dial.retrying:
        if not retry_take(conn.cluster_stat, settings.retry_permille, settings.retry_minimum):
            conn.cluster_stat.rows[worker.index].retries_refused += 1
            conn_finish(worker, conn, slot, dial.last_reason, True)
            return False
        dial.retrying = 1
    if settings.backoff_ms and not dial.paused and (conn.attempts > 1 or not dial_has_untried(worker, conn)):
        dial.paused = 1
        dial_pause(worker, conn, slot, retry_pause_ms(settings.backoff_ms, conn.attempts, worker_random(worker)))
        return False
    return True


cdef void conn_dial(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    # Dials until an attempt is on its way; ends the connection when none is left, no time, or nobody to dial for.
    cdef dial_t *dial = &conn.phase.dial
    cdef const cluster_settings_t *settings = &dial.cluster.settings
    cdef const workload_t *workload
    while True:
        if conn.attempts and dial.left_at_ms:
            conn_finish(worker, conn, slot, CLOSE_DOWNSTREAM_LEFT, True)
            return
        if conn.attempts == settings.connect_attempts or worker.now_ms >= dial.deadline_ms:
            conn_finish(worker, conn, slot, dial.last_reason, True)
            return
        if conn.attempts and not dial_again(worker, conn, slot):
            return
        if not dial.picked and not dial_pick(worker, conn):
            if conn.attempts and settings.queue_size and dial_has_untried(worker, conn):
                dial_pause(worker, conn, slot, LOOK_MS)
            else:
                conn_finish(worker, conn, slot, dial.last_reason, True)
            return
        dial.picked = 0
        dial.paused = 0
        if plan_is_own(worker.plan, &conn.endpoint):
            dial_abandon(worker, conn)
            conn_finish(worker, conn, slot, CLOSE_SELF_CALL, True)
            return
        # For the whole of the attempt: only here is it asked who a local endpoint is, which spares it the handshake.
        workload = plan_workload(worker.plan, conn.endpoint.ip)
        conn.spared = workload != NULL and not settings.encrypt_local
        if not conn_authorize(worker, conn, workload):
            conn_refuse(worker, conn, slot, CLOSE_DENIED)
            return
        if settings.tls:
            if conn.spared and not local_peer_is_expected(worker, conn):
                conn_fail_upstream(worker, conn, slot, TLS_WRONG_IDENTITY)
                return
            if not conn.spared and plan_context(worker.plan, settings.tls_identity, conn.source.ip) == NULL:
                # Before it costs an upstream connection.
                conn_refuse(worker, conn, slot, CLOSE_NO_IDENTITY)
                return
        conn.attempts += 1
        conn.cluster_stat.rows[worker.index].connect_attempts += 1
        dial.attempt_started_ns = worker.now_ns
        if dial_open(worker, conn, slot):
            break
        dial_failed(worker, conn, conn.errno_seen)
    if not conn.side[DOWNSTREAM].flags & SIDE_WATCHED and not conn_watch(worker, conn, slot, DOWNSTREAM):
        conn_finish(worker, conn, slot, CLOSE_LOCAL_EXHAUSTED, True)
        return
    dial.attempt_at_ms = worker.now_ms + settings.connect_timeout_ms
    if dial.attempt_at_ms > dial.deadline_ms:
        dial.attempt_at_ms = dial.deadline_ms
    conn_arm(worker, conn, slot, dial.attempt_at_ms)


cdef bint dial_was_answered(const conn_t *conn) noexcept nogil:
    # An endpoint that accepted, answered and reset before we came to see any of it: the answer can still be read. What is said before a
    # handshake is none.
    cdef int queued = 0
    if conn.phase.dial.cluster.settings.tls and not conn.spared:
        return False
    return ioctl(conn.side[UPSTREAM].fd, SIOCINQ, &queued) == 0 and queued > 0


cdef void conn_dialling(worker_t *worker, conn_t *conn, uint32_t slot, int side, uint32_t events) noexcept nogil:
    # An event while we dial.
    if side == UPSTREAM:
        if conn.phase.dial.handshaking:
            lanes_push(worker, conn, slot, QUEUED_HEAVY)
        elif events & (EPOLLERR | EPOLLHUP) and not dial_was_answered(conn):
            dial_failed(worker, conn, socket_error(conn.side[UPSTREAM].fd))
            conn_dial(worker, conn, slot)
        elif events & EPOLLOUT:
            if conn.phase.dial.cluster.settings.tls and not conn.spared:
                dial_secure(worker, conn, slot)
            else:
                conn_connected(worker, conn, slot)
    else:
        conn_look_for_leaving(worker, conn, slot, events)


cdef void conn_look_for_leaving(worker_t *worker, conn_t *conn, uint32_t slot, uint32_t events) noexcept nogil:
    # An event of a client that we have nothing for yet.
    cdef uint8_t byte
    if events & (EPOLLERR | EPOLLHUP):
        conn_finish(worker, conn, slot, CLOSE_DOWNSTREAM_LEFT, True)
    elif (
        # TLS may have read on, behind the handshake.
        events & EPOLLRDHUP and not conn.side[DOWNSTREAM].flags & SIDE_PENDING
        and recv(conn.side[DOWNSTREAM].fd, &byte, 1, MSG_PEEK) == 0
    ):
        # A FIN alone may be half a close: `nc -N` reading a banner. With nothing sent and the dial still under way after a
        # moment, the client has left.
        conn.phase.dial.left_at_ms = worker.now_ms + LEFT_GRACE_MS
        conn_arm(worker, conn, slot, conn.phase.dial.left_at_ms)
    elif events & EPOLLRDHUP and conn.shaping != NULL:
        conn_inject_half_closed(worker, conn, slot)


cdef void conn_recall_end(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    # A client that ended its half before we had anything to dial for: no event tells of that again.
    if conn.side[DOWNSTREAM].flags & SIDE_FIN_SEEN and conn.phase.dial.left_at_ms == 0:
        conn_look_for_leaving(worker, conn, slot, EPOLLRDHUP)


# -- upstream TLS ------------------------------------------------------------------------------------------------------------

cdef void dial_secure(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    # Connected: begins the handshake with the endpoint, under the identity of the source's workload.
    cdef const cluster_t *cluster = conn.phase.dial.cluster
    cdef const tls_context_t *context = plan_context(worker.plan, cluster.settings.tls_identity, conn.source.ip)
    cdef side_t *side = &conn.side[UPSTREAM]
    cdef SSL_SESSION *session = NULL
    if context == NULL:
        conn_refuse(worker, conn, slot, CLOSE_NO_IDENTITY)
        return
    side.flags |= SIDE_WRITABLE
    if not tls_open(worker, side, context, False, cluster.settings.tls_v12, cluster.settings.resumption, cluster.sni):
        conn_refuse(worker, conn, slot, CLOSE_LOCAL_EXHAUSTED)
        return
    side.tls.cluster = cluster
    side.tls.endpoint = conn.endpoint
    side.tls.lane_hint = lane_hint(worker, conn)
    if cluster.settings.resumption:
        session = session_find(worker, context.id, &conn.endpoint, unix_seconds())
    if session != NULL:
        # A copy: OpenSSL spoils a TLS 1.3 session that it has used. Ours may serve again: what a passive observer could link by it,
        # the addresses tell anyway.
        session = SSL_SESSION_dup(session)
        SSL_set_session(side.tls.ssl, session)
        SSL_SESSION_free(session)
    if conn.proxy_protocol and not conn_send_proxy_header(worker, conn):
        conn_refuse(worker, conn, slot, CLOSE_LOCAL_EXHAUSTED)
        return
    conn.phase.dial.handshaking = 1
    conn.phase.dial.attempt_at_ms = worker.now_ms + cluster.settings.handshake_ms
    conn_arm(worker, conn, slot, conn.phase.dial.attempt_at_ms)
    lanes_push(worker, conn, slot, QUEUED_HEAVY)


cdef void dial_handshake(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    # As far as it goes. A handshake that fails is a failed attempt: another endpoint may do better.
    cdef tls_t *tls = conn.side[UPSTREAM].tls
    cdef int32_t error = 0
    cdef int done = tls_handshake(worker, &conn.side[UPSTREAM], &error)
    if done == HANDSHAKE_DONE:
        conn.close_expired = conn.phase.dial.cluster.settings.close_expired
        conn_secured(worker, conn, UPSTREAM)
        conn_connected(worker, conn, slot)
    elif done == HANDSHAKE_FAILED:
        if tls.cause == TLS_OK:
            dial_failed(worker, conn, error)
        else:
            dial_failed_tls(worker, conn, tls.cause)
        conn_dial(worker, conn, slot)


cdef void dial_failed_tls(worker_t *worker, conn_t *conn, int cause) noexcept nogil:
    conn.alert = conn.side[UPSTREAM].tls.alert
    conn.tls_cause = <uint8_t> cause
    worker.tls_failures[UPSTREAM][<int> cause] += 1
    if cause == TLS_INTERNAL:
        dial_failed(worker, conn, ENOMEM)
        return
    dial_failed(worker, conn, EPROTO)
    conn.phase.dial.last_reason = CLOSE_UPSTREAM_TLS


# -- connected ---------------------------------------------------------------------------------------------------------------

cdef void conn_connected(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    # The dial's part of the phase ends, the relay's begins.
    cdef cluster_t *cluster = conn.phase.dial.cluster
    cdef uint64_t took_ns = clock_ns(CLOCK_MONOTONIC) - conn.phase.dial.attempt_started_ns
    cdef cluster_row_t *row = &conn.cluster_stat.rows[worker.index]
    if (worker.plan.limits_bandwidth or conn.shaping != NULL) and not conn_shape(worker, conn, &cluster.settings):
        conn_finish(worker, conn, slot, CLOSE_LOCAL_EXHAUSTED, True)
        return
    if conn.phase.dial.retrying:
        add(&conn.cluster_stat.retrying, -1)
    row.connect_ns += took_ns
    row.connect_buckets[connect_bucket(took_ns)] += 1
    if conn.endpoint_stat != NULL:
        add_u(&conn.endpoint_stat.opened, 1)
        if conn.endpoint_stat.failing:
            conn.endpoint_stat.failing = 0
        outlier_connected(conn, took_ns)
    conn.errno_seen = 0
    conn.tls_cause = TLS_OK
    conn.alert = 0
    conn.connected_us = clamp_us(conn.phase.dial.attempt_started_ns + took_ns - conn.accepted_ns) or 1
    memset(&conn.phase, 0, sizeof(phase_t))
    conn.phase.half[DOWNSTREAM].pipe.read_fd = -1
    conn.phase.half[UPSTREAM].pipe.read_fd = -1
    cluster_drop(cluster)
    conn.routed = 0
    conn.state = CONN_RELAYING
    conn.active_ms = worker.now_ms
    conn.side[UPSTREAM].flags |= SIDE_WRITABLE
    if worker.engine.leave_reason or (conn.endpoint_stat != NULL and conn.endpoint_stat.leave_reason):
        conn_ask_to_leave(worker, conn, slot, False)
    conn_arm(worker, conn, slot, conn_deadline(worker, conn))
    if conn.proxy_protocol and conn.side[UPSTREAM].tls == NULL and not conn_send_proxy_header(worker, conn):
        conn_finish(worker, conn, slot, CLOSE_LOCAL_EXHAUSTED, True)
        return
    conn_relay(worker, conn, slot)


cdef bint conn_send_proxy_header(worker_t *worker, conn_t *conn) noexcept nogil:
    # At once, not with the first byte of the client: a server that speaks first waits for it. False: no memory.
    cdef uint8_t header[128]
    cdef uint32_t length
    cdef ssize_t n
    cdef int one = 1
    setsockopt(conn.side[UPSTREAM].fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one))
    conn.side[UPSTREAM].flags |= SIDE_NODELAY
    if conn.proxy_protocol == 1:
        length = proxy_write_v1(header, &conn.source, &conn.destination)
    else:
        length = proxy_write_v2(header, &conn.source, &conn.destination)
    n = send(conn.side[UPSTREAM].fd, header, length, MSG_NOSIGNAL)
    if n < 0:
        # Whatever is wrong shows again in the relay; what was not sent must go first.
        n = 0
    if conn.side[UPSTREAM].tls != NULL:
        # In the clear, before the handshake, as HAProxy has it.
        return tls_park(conn.side[UPSTREAM].tls, header + n, length - <uint32_t> n)
    if <uint32_t> n == length:
        return True
    conn.phase.half[DOWNSTREAM].flags |= HALF_HEADER
    return half_park(&conn.phase.half[DOWNSTREAM], header + n, length - <uint32_t> n)


cdef uint64_t conn_deadline(const worker_t *worker, const conn_t *conn) noexcept nogil:
    # When the relay's timer has to look next; 0: never.
    cdef uint64_t at = 0
    cdef uint64_t quiet_ms = conn.idle_ms
    if (conn.phase.half[0].flags | conn.phase.half[1].flags) & HALF_ENDED and conn.half_closed_ms:
        if quiet_ms == 0 or conn.half_closed_ms < quiet_ms:
            quiet_ms = conn.half_closed_ms
    if quiet_ms:
        at = conn.active_ms + quiet_ms
    if conn.ends_at_ms and (at == 0 or conn.ends_at_ms < at):
        at = conn.ends_at_ms
    if conn.leaves_at_ms and (at == 0 or conn.leaves_at_ms < at):
        at = conn.leaves_at_ms
    if not conn.side[UPSTREAM].flags & SIDE_SETTLED and (at == 0 or worker.now_ms + SETTLE_MS < at):
        at = worker.now_ms + SETTLE_MS
    return at


cdef void conn_settle(conn_t *conn) noexcept nogil:
    # Downstream has these from its listener. Upstream they are set once the connection has proved to stay.
    cdef int fd = conn.side[UPSTREAM].fd
    cdef int one = 1
    cdef int idle = conn.keepalive_idle_s
    cdef int interval = conn.keepalive_interval_s
    cdef int count = conn.keepalive_count
    conn.side[UPSTREAM].flags |= SIDE_SETTLED
    if idle:
        setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one))
        setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle))
        setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof(interval))
        setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof(count))
    if conn.user_timeout_ms:
        setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &conn.user_timeout_ms, sizeof(conn.user_timeout_ms))


# -- relay -------------------------------------------------------------------------------------------------------------------

cdef void conn_tune(worker_t *worker, conn_t *conn, int side) noexcept nogil:
    # A stream has come to this side, of which it could not be told before that it stays on this host.
    cdef const address_t *peer = &conn.source if side == DOWNSTREAM else &conn.endpoint
    conn.side[side].flags |= SIDE_TUNED
    if worker.engine.paces and (stays_here(worker.plan, peer) or ip_is_local(peer)):
        side_unpace(&conn.side[side])


cdef void conn_relay(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    # Moves both halves as far as they go now.
    cdef half_t *half
    cdef flow_t flow
    cdef bint more = False
    cdef uint64_t moved[2]
    cdef bint expired = conn.queued == QUEUED_HELD and conn.held_until_ns <= worker.now_ns
    cdef int h
    memset(moved, 0, sizeof(moved))
    if conn.queued == QUEUED_HELD:
        # Whatever called us: what has come of the stream meanwhile goes on with it.
        queue_remove(worker, conn)
        for h in range(2):
            if conn.phase.half[h].flags & HALF_PACED:
                conn.side[h].flags |= SIDE_READABLE
    for h in range(2):
        half = &conn.phase.half[h]
        if half.flags & (HALF_SHUT | HALF_DROPPED):
            continue
        moved[h] = half.bytes
        flow = half_step(worker, conn, h)
        moved[h] = half.bytes - moved[h]
        if half.bytes >= TUNE_BYTES and not conn.side[1 - h].flags & SIDE_TUNED:
            conn_tune(worker, conn, 1 - h)
        if flow == FLOW_MORE:
            more = True
        elif flow == FLOW_END:
            if h == UPSTREAM:
                outlier_ended(worker, conn)
            if conn.side[h].flags & SIDE_ERROR:
                # It reset behind its end, before we came to read that: a read tells of the end alone.
                conn.errno_seen = socket_error(conn.side[h].fd)
                conn_reset(worker, conn, slot, h)
                return
            if conn.phase.half[1 - h].flags & HALF_SHUT:
                # The second end: closing tells it as well as shutdown would.
                conn_finish(
                    worker, conn, slot,
                    CLOSE_DOWNSTREAM_CLOSED if conn.first_end == DOWNSTREAM else CLOSE_UPSTREAM_CLOSED, False,
                )
                return
            shutdown(conn.side[1 - h].fd, SHUT_WR)
            half.flags |= HALF_SHUT
            conn.first_end = <uint8_t> h
            if conn.half_closed_ms:
                conn_arm(worker, conn, slot, worker.now_ms + conn.half_closed_ms)
        elif flow == FLOW_SOURCE_RESET:
            conn_reset(worker, conn, slot, h)
            return
        elif flow == FLOW_DESTINATION_RESET:
            conn_reset(worker, conn, slot, 1 - h)
            return
        elif flow == FLOW_EXHAUSTED:
            conn_finish(worker, conn, slot, CLOSE_LOCAL_EXHAUSTED, True)
            return
    if conn.shaping == NULL:
        for h in range(2):
            if half_pace(conn, h, moved[h], moved[1 - h], expired):
                more = True
    elif conn_shaped(worker, conn, slot):
        return
    if more:
        queue_push(worker, conn, slot, QUEUED_READY)
    elif (conn.phase.half[DOWNSTREAM].flags | conn.phase.half[UPSTREAM].flags) & HALF_PACED:
        worker.holds += 1
        conn.held_until_ns = clock_ns(CLOCK_MONOTONIC) + PACE_NS
        queue_push(worker, conn, slot, QUEUED_HELD)


# -- reset -------------------------------------------------------------------------------------------------------------------

cdef bint conn_blame_tls(worker_t *worker, conn_t *conn, int side) noexcept nogil:
    # Counts what TLS with this side failed of, and makes it the reason. False: nothing of the kind.
    cdef const tls_t *tls = conn.side[side].tls
    if tls == NULL or tls.cause == TLS_OK:
        return False
    conn.end_reason = CLOSE_DOWNSTREAM_TLS if side == DOWNSTREAM else CLOSE_UPSTREAM_TLS
    worker.tls_failures[side][<int> tls.cause] += 1
    if tls.cause == TLS_INTERNAL:
        conn.end_reason = CLOSE_LOCAL_EXHAUSTED
    elif side == UPSTREAM and not tls.flags & TLS_ANSWERED and not conn_is_faulted(conn):
        # A TLS 1.3 server judges our certificate when our handshake is over: this one has refused it.
        conn.cluster_stat.rows[worker.index].connect_failures += 1
        if conn.endpoint_stat != NULL:
            add_u(&conn.endpoint_stat.connect_failures, 1)
        outlier_refused_tls(worker, conn)
    return True


cdef void conn_reset(worker_t *worker, conn_t *conn, uint32_t slot, int side) noexcept nogil:
    # One side is gone. What it had sent is delivered before the other side learns of it.
    cdef bint lost = conn.errno_seen == ETIMEDOUT or conn.errno_seen == EHOSTUNREACH or conn.errno_seen == ENETUNREACH
    if not conn_blame_tls(worker, conn, side):
        if side == DOWNSTREAM:
            conn.end_reason = CLOSE_DOWNSTREAM_LOST if lost else CLOSE_DOWNSTREAM_RESET
        else:
            conn.end_reason = CLOSE_UPSTREAM_LOST if lost else CLOSE_UPSTREAM_RESET
    conn.side[side].flags |= SIDE_RESET | SIDE_READABLE
    queue_remove(worker, conn)
    half_drop(worker, &conn.phase.half[1 - side])
    conn.state = CONN_RESETTING
    conn.first_end = <uint8_t> side
    conn.linger_ms = 1
    conn.ends_at_ms = worker.now_ms + (conn.half_closed_ms if conn.half_closed_ms else RESET_LIMIT_MS)
    conn_drain(worker, conn, slot)


cdef void conn_drain(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    # RESETTING: hands over what is left, waits until it is acknowledged, then resets the other side.
    cdef int side = conn.first_end
    cdef half_t *half = &conn.phase.half[side]
    cdef int queued = 0
    cdef flow_t flow = FLOW_END
    if not half.flags & (HALF_SHUT | HALF_DROPPED):
        flow = half_step(worker, conn, side)
    if (
        flow == FLOW_SOURCE_RESET and conn.end_reason != CLOSE_DOWNSTREAM_TLS and conn.end_reason != CLOSE_UPSTREAM_TLS
        and conn.end_reason != CLOSE_LOCAL_EXHAUSTED
    ):
        # A peer that refuses us says why, and resets: the write that met the reset came before the read that finds the alert.
        conn_blame_tls(worker, conn, side)
    if flow == FLOW_MORE:
        queue_push(worker, conn, slot, QUEUED_READY)
    elif flow == FLOW_BLOCKED:
        if conn.shaping != NULL:
            if conn_shaped(worker, conn, slot):
                return
            if shaping_waits(worker, conn):
                conn.ends_at_ms = worker.now_ms + (conn.half_closed_ms if conn.half_closed_ms else RESET_LIMIT_MS)
        conn_arm(worker, conn, slot, conn.ends_at_ms)
    elif (
        (flow == FLOW_END or flow == FLOW_SOURCE_RESET)
        # A side that was reset as well acknowledges nothing more; that may have been told before, while its half waited.
        and not conn.side[1 - side].flags & (SIDE_ERROR | SIDE_RESET)
        and worker.now_ms < conn.ends_at_ms
        and ioctl(conn.side[1 - side].fd, SIOCOUTQ, &queued) == 0
        and queued > 0
    ):
        conn_arm(worker, conn, slot, worker.now_ms + conn.linger_ms)
        if conn.linger_ms < LINGER_MAX_MS:
            conn.linger_ms *= 2
    else:
        conn_finish(worker, conn, slot, conn.end_reason, True)


# -- ends that can wait -------------------------------------------------------------------------------------------------------
# The gradual closer: whatever ends connections that still work (drain, an endpoint that is gone, a certificate that has expired, age)
# gives each a time of its own by chance, so that their clients don't all come back together.

cdef inline void conn_end_by(conn_t *conn, uint64_t at_ms, int reason) noexcept nogil:
    # Whatever happens until then: the earliest of what sets an end.
    if conn.ends_at_ms == 0 or at_ms < conn.ends_at_ms:
        conn.ends_at_ms = at_ms
        conn.end_reason = <uint8_t> reason


cdef void conn_leave(worker_t *worker, conn_t *conn, uint32_t slot, int reason, uint32_t over_ms) noexcept nogil:
    # Told again, by the next sweep, it keeps its time: else sweep after sweep would hurry it.
    cdef uint64_t at_ms
    if conn.leaves_at_ms and conn.leave_reason == reason:
        return
    at_ms = worker.now_ms + worker_random(worker) % (<uint64_t> over_ms + 1)
    if conn.leaves_at_ms == 0 or at_ms < conn.leaves_at_ms or not leave_stands(worker, conn):
        conn.leaves_at_ms = at_ms
        conn.leave_reason = <uint8_t> reason
        conn_arm(worker, conn, slot, at_ms)


cdef bint leave_stands(const worker_t *worker, const conn_t *conn) noexcept nogil:
    # An endpoint may be well again, a takeover called off.
    if conn.leave_reason == worker.engine.leave_reason or conn.leave_reason == CLOSE_REBALANCED:
        return True
    return conn.endpoint_stat != NULL and conn.endpoint_stat.leave_reason == conn.leave_reason


cdef void conn_ask_to_leave(worker_t *worker, conn_t *conn, uint32_t slot, bint swept) noexcept nogil:
    # Is there a reason to leave? Asked by every sweep, and once connected.
    cdef const endpoint_stat_t *stat = conn.endpoint_stat
    if worker.engine.leave_reason:
        conn_leave(worker, conn, slot, worker.engine.leave_reason, worker.engine.leave_over_ms)
    if stat == NULL or stat.leave_reason == 0:
        return
    if stat.leave_permille == 1000 or (
        swept and worker.sweep_from < stat.leave_sweep <= worker.sweep and worker_random(worker) % 1000 < stat.leave_permille
    ):
        conn_leave(worker, conn, slot, stat.leave_reason, stat.leave_over_ms)


cdef void worker_begin_sweep(worker_t *worker) noexcept nogil:
    # For all that was asked since the last one was begun: who asks for a share of connections is to get it once. One under way, begun
    # again because trust has changed, is still for what it was for.
    if worker.sweep_end == 0:
        worker.sweep_from = worker.sweep
    worker.sweep_slot = 0
    worker.sweep_end = worker.n_chunks * CONN_CHUNK
    # Last: who finds it begun must not find the end of the one before (Engine.swept).
    store_release(&worker.sweep, load_acquire(&worker.engine.sweep))


cdef void worker_sweep(worker_t *worker) noexcept nogil:
    # Some of the live connections at a turn, until all have been looked at.
    cdef uint32_t end = worker.sweep_slot + SWEEP_STEP
    cdef conn_t *conn
    cdef int reason
    if end > worker.sweep_end:
        end = worker.sweep_end
    while worker.sweep_slot < end:
        conn = conn_at(worker, worker.sweep_slot)
        if conn.state == CONN_RELAYING or conn.state == CONN_QUEUED or conn.state == CONN_DIALLING:
            overload_count(worker, conn)
            if worker.sweep_trust and not conn_still_trusted(worker, conn, &reason):
                conn_finish(worker, conn, worker.sweep_slot, reason, True)
            elif conn.state == CONN_RELAYING and overload_ends(worker, conn):
                conn_finish(worker, conn, worker.sweep_slot, CLOSE_OVERLOAD, True)
            elif conn.state == CONN_RELAYING or conn.attempts:
                conn_ask_to_leave(worker, conn, worker.sweep_slot, True)
        worker.sweep_slot += 1
    if worker.sweep_slot >= worker.sweep_end:
        worker.sweep_end = 0
        worker.sweep_trust = 0
        if load_acquire(&worker.engine.sweep) != worker.sweep:
            worker_begin_sweep(worker)


# -- close and record --------------------------------------------------------------------------------------------------------

cdef void conn_finish(worker_t *worker, conn_t *conn, uint32_t slot, int reason, bint reset) noexcept nogil:
    # The one way out: counts, records, and gives back everything that the connection owns.
    cdef int h
    L4_BUG(conn.state == CONN_FREE, "a connection ends twice")
    if conn.queued == QUEUED_LINE:
        conn_book_wait(worker, conn)
    if conn_is_logged(worker, reason):
        conn_record(worker, conn, reason)
    conn.listener_stat.rows[worker.index].closed[reason] += 1
    add(&conn.listener_stat.active, -1)
    conn.cluster_stat.rows[worker.index].closed[reason] += 1
    if conn.state == CONN_QUEUED:
        line_leave(worker, conn)
    elif conn.cluster_stat != worker.engine.no_cluster:
        if conn.routed and conn.phase.dial.retrying:
            add(&conn.cluster_stat.retrying, -1)
        add_ordered(&conn.cluster_stat.active, -1)
    else:
        conn.cluster_stat.rows[worker.index].opened += 1
    if conn.routed:
        cluster_drop(conn.phase.dial.cluster)
    elif conn.state == CONN_RELAYING or conn.state == CONN_RESETTING:
        outlier_finished(worker, conn, reason)
        if conn.endpoint_stat != NULL:
            add_u(&conn.endpoint_stat.bytes_to_upstream, conn.phase.half[DOWNSTREAM].bytes)
            add_u(&conn.endpoint_stat.bytes_to_downstream, conn.phase.half[UPSTREAM].bytes)
        for h in range(2):
            free(conn.phase.half[h].parked)
            half_release_pipe(worker, &conn.phase.half[h])
    if conn.endpoint_stat != NULL:
        add_ordered(&conn.endpoint_stat.active, -1)
    if conn.state != CONN_QUEUED and load_ordered(&conn.cluster_stat.waiting):
        places_offer(worker, conn.cluster_stat)
    if conn.source_count != NULL:
        source_give(worker.engine.sources, conn.source_count)
    if conn.handshake_count != NULL:
        source_give(worker.engine.handshakes, conn.handshake_count)
    tls_free(&conn.side[UPSTREAM])
    tls_free(&conn.side[DOWNSTREAM])
    socket_close(conn.side[UPSTREAM].fd, reset)
    socket_close(conn.side[DOWNSTREAM].fd, reset)
    wheel_remove(&worker.wheel, &conn.timer)
    queue_remove(worker, conn)
    if conn.shaping != NULL:
        shaping_free(conn)
    worker.active -= 1
    add(&worker.engine.active, -1)
    slab_give(worker, conn, slot)


cdef bint conn_is_logged(worker_t *worker, int reason) noexcept nogil:
    cdef const plan_t *plan = worker.plan
    if reason == CLOSE_HANDED_OVER:
        # The process that has it records its end.
        return False
    if plan.log_when == LOG_NEVER or (plan.log_when == LOG_ERRORS and (plan.error_reasons >> reason) & 1 == 0):
        return False
    return plan.log_sample == <uint64_t> -1 or worker_random(worker) <= plan.log_sample


cdef void tcp_figures(int fd, int64_t *rtt_us, int64_t *retransmits) noexcept nogil:
    cdef tcp_info info
    cdef socklen_t size = sizeof(info)
    rtt_us[0] = -1
    retransmits[0] = -1
    if fd >= 0 and getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) == 0:
        rtt_us[0] = info.tcpi_rtt
        retransmits[0] = info.tcpi_total_retrans


cdef void conn_record(worker_t *worker, conn_t *conn, int reason) noexcept nogil:
    cdef record_t *record = ring_claim(&worker.ring)
    cdef tls_t *tls
    cdef int side
    cdef bint relayed = conn.state == CONN_RELAYING or conn.state == CONN_RESETTING
    if record == NULL:
        return
    record.ended_unix_ms = clock_ns(CLOCK_REALTIME) // 1000000
    record.listener_id = conn.listener_stat.id
    record.cluster_id = conn.cluster_stat.id
    record.source = conn.source
    record.destination = conn.destination
    record.endpoint = conn.endpoint
    record.reason = reason
    record.attempts = conn.attempts
    record.queued_ms = conn.queued_ms if conn.queued_ms else -1
    record.errno_seen = conn.errno_seen
    record.connect_us = conn.connected_us if conn.connected_us else -1
    record.first_byte_us = conn.first_byte_us if conn.first_byte_us else -1
    record.total_us = <int64_t> ((worker.now_ns - conn.accepted_ns) // 1000)
    record.bytes_to_upstream = conn.phase.half[DOWNSTREAM].bytes if relayed else 0
    record.bytes_to_downstream = conn.phase.half[UPSTREAM].bytes if relayed else 0
    tcp_figures(conn.side[DOWNSTREAM].fd, &record.downstream_rtt_us, &record.downstream_retransmits)
    tcp_figures(conn.side[UPSTREAM].fd if relayed else -1, &record.upstream_rtt_us, &record.upstream_retransmits)
    record.policy = conn.policy
    record.dry_policy = conn.dry_policy
    record.fault = conn.shaping.fault.kind if conn.shaping != NULL and conn.shaping.injected else <uint8_t> FAULT_NONE
    record.cause = conn.tls_cause
    record.alert = conn.alert
    for side in range(2):
        # The identity changes hands: the reader of the record frees it.
        tls = conn.side[side].tls
        record.peers[side] = NULL
        record.versions[side] = 0
        record.resumed[side] = 0
        if tls == NULL:
            continue
        record.peers[side] = tls.peer
        tls.peer = NULL
        if tls.cause != TLS_OK:
            record.cause = tls.cause
            record.alert = tls.alert
        if tls.flags & TLS_READY:
            record.versions[side] = 2 if SSL_version(tls.ssl) == TLS1_2_VERSION else 3
            record.resumed[side] = tls.flags & TLS_RESUMED != 0
    ring_push(&worker.ring, worker.engine.up_fd)


# -- hand over to another process --------------------------------------------------------------------------------------------

cdef void conn_depart(worker_t *worker, conn_t *conn, uint32_t slot, passage_t *passage) noexcept nogil:
    # Out of everything that could move it. The other process holds the same sockets, so that closing ours would not take them out of
    # the epoll.
    cdef epoll_event event
    cdef int side
    queue_remove(worker, conn)
    wheel_remove(&worker.wheel, &conn.timer)
    for side in range(2):
        epoll_ctl(worker.epoll_fd, EPOLL_CTL_DEL, conn.side[side].fd, &event)
    conn.state = CONN_DEPARTING
    passage_pack(passage, conn, slot)


cdef void conn_go_on(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    # DEPARTING after all not, or ARRIVING: relays. What its sockets are ready for is found out by trying.
    cdef uint64_t at
    cdef int side
    conn.state = CONN_RELAYING
    for side in range(2):
        conn.side[side].flags |= SIDE_READABLE | SIDE_WRITABLE
        if not conn_watch(worker, conn, slot, side):
            conn_finish(worker, conn, slot, CLOSE_LOCAL_EXHAUSTED, True)
            return
    at = conn_deadline(worker, conn)
    if at:
        conn_arm(worker, conn, slot, at)
    conn_relay(worker, conn, slot)


cdef void conn_forget(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    # DEPARTING: the other process has it. Its bytes are counted for the endpoint where it ends.
    conn.state = CONN_RELAYING
    conn.phase.half[DOWNSTREAM].bytes = 0
    conn.phase.half[UPSTREAM].bytes = 0
    conn_finish(worker, conn, slot, CLOSE_HANDED_OVER, False)


cdef void conn_turn_away(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    # ARRIVING after all not: the process that it came from goes on with it.
    cdef int h
    for h in range(2):
        free(conn.phase.half[h].parked)
        half_release_pipe(worker, &conn.phase.half[h])
        close(conn.side[h].fd)
    slab_give(worker, conn, slot)


cdef void conn_reshape(worker_t *worker, conn_t *conn) noexcept nogil:
    # ARRIVING: the limits of bandwidth of this process. Without memory it goes on without.
    cdef const plan_t *plan = worker.plan
    cdef uint32_t i
    cdef int h
    for i in range(plan.n_clusters):
        if plan.clusters[i].stat == conn.cluster_stat:
            conn_shape(worker, conn, &plan.clusters[i].settings)
            break
    if conn.shaping != NULL:
        for h in range(2):
            if conn.phase.half[h].flags & HALF_PACED:
                half_set_pace(&conn.phase.half[h], &conn.side[h], 1)


cdef void conn_welcome(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    # ARRIVING: counted as live, but as opened only where it was accepted. Limits hold for what comes after it, and it may stay only if
    # it would be let in here.
    cdef int reason
    worker.active += 1
    add(&worker.engine.active, 1)
    add(&conn.listener_stat.active, 1)
    add(&conn.cluster_stat.active, 1)
    if conn.endpoint_stat != NULL:
        add(&conn.endpoint_stat.active, 1)
    overload_count(worker, conn)
    conn.state = CONN_RELAYING
    if not conn_still_trusted(worker, conn, &reason):
        conn_finish(worker, conn, slot, reason, True)
        return
    if worker.plan.limits_bandwidth:
        conn_reshape(worker, conn)
    conn_ask_to_leave(worker, conn, slot, False)
    conn_go_on(worker, conn, slot)


cdef inline bint conn_may_depart(const conn_t *conn) noexcept nogil:
    # Plaintext only, because the keys of TLS stay in their process; and what is broken on purpose is so to its end.
    if conn.state != CONN_RELAYING or conn.side[DOWNSTREAM].tls != NULL or conn.side[UPSTREAM].tls != NULL:
        return False
    return conn.shaping == NULL or conn.shaping.fault.kind == FAULT_NONE


cdef void worker_depart(worker_t *worker) noexcept nogil:
    # Takes out what fits into one batch.
    cdef handover_t *handover = &worker.handover
    cdef uint32_t slot = handover.start
    cdef uint32_t end = worker.n_chunks * CONN_CHUNK
    cdef uint32_t last = slot + DEPART_SLOTS if slot + DEPART_SLOTS < end else end
    cdef conn_t *conn
    handover.count = 0
    while slot < last and handover.count < PASSAGES:
        conn = conn_at(worker, slot)
        if conn_may_depart(conn):
            conn_depart(worker, conn, slot, &handover.passages[handover.count])
            handover.count += 1
        slot += 1
    handover.next = slot if slot < end else 0


cdef void worker_arrive(worker_t *worker) noexcept nogil:
    # Gives each of the batch a slot, or none of them any.
    cdef handover_t *handover = &worker.handover
    cdef conn_t *conn
    cdef uint32_t slots[PASSAGES]
    cdef uint32_t i, taken = 0
    while taken < handover.count and slab_take(worker, &slots[taken]) != NULL:
        taken += 1
    handover.flag = taken == handover.count
    for i in range(taken):
        conn = conn_at(worker, slots[i])
        if handover.flag:
            passage_unpack(worker, &handover.passages[i], conn, slots[i])
        else:
            slab_give(worker, conn, slots[i])


cdef void worker_settle(worker_t *worker) noexcept nogil:
    cdef handover_t *handover = &worker.handover
    cdef conn_t *conn
    cdef uint32_t i, slot
    for i in range(handover.count):
        slot = handover.passages[i].slot
        conn = conn_at(worker, slot)
        if conn.state == CONN_DEPARTING and handover.flag:
            conn_go_on(worker, conn, slot)
        elif conn.state == CONN_DEPARTING:
            conn_forget(worker, conn, slot)
        elif conn.state == CONN_ARRIVING and handover.flag:
            conn_welcome(worker, conn, slot)
        elif conn.state == CONN_ARRIVING:
            conn_turn_away(worker, conn, slot)
    handover.count = 0


cdef void worker_handover(worker_t *worker) noexcept nogil:
    # Does what the control loop asks, after the events of the turn: none of those that depart is dispatched any more.
    cdef handover_t *handover = &worker.handover
    cdef uint64_t asked = load_acquire(&handover.asked)
    cdef uint64_t one = 1
    if asked == 0 or not swap_u(&handover.asked, asked, HANDOVER_BEGUN):
        return
    if asked == HANDOVER_DEPART:
        worker_depart(worker)
    elif asked == HANDOVER_ARRIVE:
        worker_arrive(worker)
    elif asked == HANDOVER_SETTLE:
        worker_settle(worker)
    # In this order: who asks next can tell an answer that nobody took from that to its own question.
    write(handover.done_fd, &one, sizeof(one))
    store_release(&handover.asked, 0)


# -- the loop ----------------------------------------------------------------------------------------------------------------

cdef void conn_event(worker_t *worker, uint64_t tag, uint32_t events, bint crowded) noexcept nogil:
    # `crowded`: more happened at once than a short turn can serve.
    cdef uint32_t slot = <uint32_t> (tag >> 32)
    cdef int side = <int> (tag & 1)
    cdef conn_t *conn = conn_at(worker, slot)
    cdef side_t *one_side = &conn.side[side]
    cdef int one = 1
    if conn.state == CONN_FREE or event_tag(conn, slot, side) != tag:
        return
    if events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR):
        one_side.flags |= SIDE_READABLE
    if events & (EPOLLOUT | EPOLLERR):
        one_side.flags |= SIDE_WRITABLE
    if events & EPOLLRDHUP:
        one_side.flags |= SIDE_FIN_SEEN
    if events & EPOLLERR:
        one_side.flags |= SIDE_ERROR
    if events & EPOLLPRI and not one_side.flags & SIDE_URGENT:
        # The urgent byte is passed on as one of the others; without this recv would leave it out.
        setsockopt(one_side.fd, SOL_SOCKET, SO_OOBINLINE, &one, sizeof(one))
        one_side.flags |= SIDE_URGENT
    if conn.state == CONN_RELAYING:
        if events & EPOLLERR and conn.phase.half[side].flags & (HALF_ENDED | HALF_DROPPED):
            # No read will come across this error any more.
            conn.errno_seen = socket_error(one_side.fd)
            conn_reset(worker, conn, slot, side)
        elif conn.queued != QUEUED_HELD and (crowded or lane_is_in_use(worker, conn)):
            lanes_push(worker, conn, slot, QUEUED_EVENT)
        else:
            conn_relay(worker, conn, slot)
    elif conn.state == CONN_DIALLING:
        conn_dialling(worker, conn, slot, side, events)
    elif conn.state == CONN_RESETTING:
        if events & EPOLLERR and side != conn.first_end:
            conn_finish(worker, conn, slot, conn.end_reason, True)
        else:
            conn_drain(worker, conn, slot)
    elif conn.state == CONN_HANDSHAKE:
        conn_push_handshake(worker, conn, slot)
    elif conn.state == CONN_HELLO:
        conn_hello(worker, conn, slot, False)
    elif conn.state == CONN_QUEUED:
        conn_look_for_leaving(worker, conn, slot, events)
    else:
        conn_preface(worker, conn, slot)


cdef void conn_timeout(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    cdef uint64_t at
    if conn.state == CONN_PREFACE:
        conn_refuse(worker, conn, slot, CLOSE_PROXY_PROTOCOL_TIMEOUT)
    elif conn.state == CONN_HELLO or conn.state == CONN_HANDSHAKE:
        if worker.now_ms < conn.phase.dial.attempt_at_ms:
            conn_arm(worker, conn, slot, conn.phase.dial.attempt_at_ms)
        elif conn.state == CONN_HELLO:
            conn_hello(worker, conn, slot, True)
        else:
            conn.side[DOWNSTREAM].tls.cause = TLS_TIMEOUT
            worker.tls_failures[DOWNSTREAM][<int> TLS_TIMEOUT] += 1
            conn_finish(worker, conn, slot, CLOSE_DOWNSTREAM_TLS, True)
    elif conn.state == CONN_DIALLING:
        if conn.phase.dial.left_at_ms and worker.now_ms >= conn.phase.dial.left_at_ms:
            conn_finish(worker, conn, slot, CLOSE_DOWNSTREAM_LEFT, True)
        elif conn.shaping != NULL and conn.shaping.until_ms:
            conn_inject_timeout(worker, conn, slot)
        elif worker.now_ms >= conn.phase.dial.attempt_at_ms:
            if conn.phase.dial.handshaking:
                dial_failed_tls(worker, conn, TLS_TIMEOUT)
            elif conn.side[UPSTREAM].fd >= 0:
                dial_failed(worker, conn, ETIMEDOUT)
            conn_dial(worker, conn, slot)
        else:
            conn_arm(worker, conn, slot, conn.phase.dial.attempt_at_ms)
    elif conn.state == CONN_QUEUED:
        if conn.phase.dial.left_at_ms and worker.now_ms >= conn.phase.dial.left_at_ms:
            conn_finish(worker, conn, slot, CLOSE_DOWNSTREAM_LEFT, True)
        elif worker.now_ms >= conn.phase.dial.attempt_at_ms:
            conn_finish(worker, conn, slot, CLOSE_QUEUE_TIMEOUT, True)
        else:
            conn_arm(worker, conn, slot, conn.phase.dial.attempt_at_ms)
    elif conn.state == CONN_RESETTING:
        if worker.now_ms >= conn.ends_at_ms and not (conn.shaping != NULL and shaping_waits(worker, conn)):
            conn_finish(worker, conn, slot, conn.end_reason, True)
        else:
            conn_drain(worker, conn, slot)
    else:
        if conn.shaping != NULL and conn_shaping_timeout(worker, conn, slot):
            return
        if conn.ends_at_ms and worker.now_ms >= conn.ends_at_ms:
            conn_finish(worker, conn, slot, conn.end_reason, True)
            return
        if conn.leaves_at_ms and worker.now_ms >= conn.leaves_at_ms:
            if leave_stands(worker, conn):
                conn_finish(worker, conn, slot, conn.leave_reason, True)
                return
            conn.leaves_at_ms = 0
            # Another reason may stand, which then had a later time.
            conn_ask_to_leave(worker, conn, slot, False)
        at = conn_deadline(worker, conn)
        if at and at <= worker.now_ms and (conn.queued == QUEUED_EVENT or conn.active_ms == worker.stale_ms):
            # Not idle: it waits for its turn, or had it in a turn that stood still, which counts by the time of its beginning.
            conn.active_ms = worker.now_ms
            at = conn_deadline(worker, conn)
        if at and at <= worker.now_ms:
            if (conn.phase.half[0].flags | conn.phase.half[1].flags) & HALF_ENDED:
                conn_finish(worker, conn, slot, CLOSE_HALF_CLOSED_TIMEOUT, True)
            else:
                conn_finish(worker, conn, slot, CLOSE_IDLE_TIMEOUT, True)
            return
        if not conn.side[UPSTREAM].flags & SIDE_SETTLED:
            conn_settle(conn)
            outlier_lived(worker, conn)
            at = conn_deadline(worker, conn)
        if at:
            conn_arm(worker, conn, slot, at)


cdef void worker_adopt(worker_t *worker, plan_t *plan) noexcept nogil:
    # Goes over to a new plan: connections that wait at a removed listener are still taken, under the old plan; then the sockets
    # of the new one are watched. The control loop closes the removed ones when all workers have been here.
    cdef epoll_event event
    cdef armed_t *armed
    cdef uint32_t i, j
    cdef bint paused = worker.accept_paused_until_ms != 0
    if worker.plan != NULL:
        for i in range(worker.n_armed):
            armed = &worker.armed[i]
            for j in range(plan.n_listeners):
                if plan.listeners[j].fds[worker.index] == armed.fd:
                    break
            else:
                armed.burst = 65536
                listener_accept(worker, i)
                lanes_serve(worker, worker.lanes.n)
        if worker.plan.trust != plan.trust:
            worker.sweep_trust = 1
            worker_begin_sweep(worker)
        elif plan.max_connections_per_source and not worker.plan.max_connections_per_source:
            # Those that are there are to be counted.
            worker_begin_sweep(worker)
    worker.accept_paused_until_ms = 0
    for i in range(worker.n_armed):
        if not paused:
            epoll_ctl(worker.epoll_fd, EPOLL_CTL_DEL, worker.armed[i].fd, &event)
    worker.plan = plan
    worker_adopt_lines(worker)
    if worker.accept_mode == ACCEPT_ON:
        worker_arm(worker)


cdef void worker_arm(worker_t *worker) noexcept nogil:
    # Watches the listening sockets of its plan.
    cdef const plan_t *plan = worker.plan
    cdef uint32_t i
    cdef armed_t *armed
    worker.n_armed = 0
    for i in range(plan.n_listeners if plan != NULL else 0):
        if plan.listeners[i].fds[worker.index] < 0:
            # Sockets of a process before, which had more workers: not every one has another.
            continue
        armed = &worker.armed[worker.n_armed]
        armed.fd = plan.listeners[i].fds[worker.index]
        armed.listener = i
        armed.burst = 1
        worker.n_armed += 1
    accept_resume(worker)


cdef void worker_show_page(worker_t *worker) noexcept nogil:
    # Answers the control loop's question for a page of live connections.
    cdef page_t *page = &worker.page
    cdef uint32_t slot = page.start
    cdef uint32_t end = worker.n_chunks * CONN_CHUNK
    cdef const conn_t *conn
    cdef const tls_t *tls
    cdef view_t *view
    cdef uint64_t one = 1
    cdef int side
    cdef bint relayed
    page.count = 0
    while slot < end and page.count < page.limit:
        conn = conn_at(worker, slot)
        slot += 1
        if conn.state == CONN_FREE or conn.state == CONN_ARRIVING:
            continue
        relayed = conn.state == CONN_RELAYING or conn.state == CONN_RESETTING or conn.state == CONN_DEPARTING
        view = &page.views[page.count]
        page.count += 1
        view.slot = slot - 1
        view.generation = conn.generation
        view.state = conn.state
        view.listener_id = conn.listener_stat.id
        view.cluster_id = conn.cluster_stat.id
        view.source = conn.source
        view.destination = conn.destination
        view.endpoint = conn.endpoint
        view.age_ms = (worker.now_ns - conn.accepted_ns) // 1000000
        view.idle_ms = worker.now_ms - conn.active_ms
        view.spliced = relayed and (conn.phase.half[0].flags | conn.phase.half[1].flags) & HALF_SPLICE != 0
        view.bytes_to_upstream = conn.phase.half[DOWNSTREAM].bytes if relayed else 0
        view.bytes_to_downstream = conn.phase.half[UPSTREAM].bytes if relayed else 0
        for side in range(2):
            tls = conn.side[side].tls
            view.peers[side] = strdup(tls.peer) if tls != NULL and tls.peer != NULL else NULL
            view.versions[side] = 0
            if tls != NULL and tls.flags & TLS_READY:
                view.versions[side] = 2 if SSL_version(tls.ssl) == TLS1_2_VERSION else 3
    page.next = slot if slot < end else 0
    store_release(<uint64_t *> &page.state, 2)
    write(worker.engine.up_fd, &one, sizeof(one))


cdef inline int worker_wait_ms(const worker_t *worker) noexcept nogil:
    cdef uint64_t at = wheel_next_ms(&worker.wheel)
    if worker.ready.head != WHEEL_NONE or worker.heavy.n or worker.sweep_end or worker.lanes.n or worker.serving:
        return 0
    if worker.accept_paused_until_ms and (at == 0 or worker.accept_paused_until_ms < at):
        at = worker.accept_paused_until_ms
    if at == 0:
        return -1
    if at <= worker.now_ms:
        return 0
    return <int> (at - worker.now_ms) if at - worker.now_ms < 60000 else 60000


cdef inline int worker_wait(worker_t *worker) noexcept nogil:
    # Until something happens or is due; gives the number of events.
    cdef int wait_ms = worker_wait_ms(worker)
    cdef uint64_t at_ns, now_ns
    cdef timespec left
    cdef int n
    if worker.held.head != WHEEL_NONE and wait_ms:
        # A stream is held for less than epoll_wait can tell. Before Linux 5.11 it is held for the millisecond.
        at_ns = conn_at(worker, worker.held.head).held_until_ns
        now_ns = clock_ns(CLOCK_MONOTONIC)
        left.tv_sec = 0
        left.tv_nsec = <long> (at_ns - now_ns) if at_ns > now_ns else 0
        doing(worker, DOING_WAIT, worker.now_ms + 1)
        n = l4_epoll_pwait2(worker.epoll_fd, worker.events, MAX_EVENTS, &left)
        if n >= 0 or errno != ENOSYS:
            return n
        wait_ms = 1
    doing(worker, DOING_WAIT, worker.now_ms + <uint64_t> wait_ms if wait_ms >= 0 else 0)
    return epoll_wait(worker.epoll_fd, worker.events, MAX_EVENTS, wait_ms)


cdef void worker_serve_heavy(worker_t *worker) noexcept nogil:
    # Steps of handshakes: one, or as many as take as long as the rest of the turn did. Then others get their turn: else a batch of
    # handshakes would hold up every byte that is to be relayed (HAProxy's TL_HEAVY).
    cdef uint64_t began_ns, took_ns
    cdef conn_t *conn
    cdef uint32_t slot
    if worker.heavy.n == 0:
        return
    began_ns = clock_ns(CLOCK_MONOTONIC)
    took_ns = began_ns - worker.now_ns
    while True:
        slot = lanes_pop(worker, &worker.heavy)
        if slot == WHEEL_NONE:
            return
        conn = conn_at(worker, slot)
        doing(worker, DOING_HANDSHAKE, slot)
        if conn.state == CONN_HANDSHAKE:
            conn_handshake(worker, conn, slot)
        elif conn.state == CONN_DIALLING and conn.phase.dial.handshaking:
            dial_handshake(worker, conn, slot)
        if clock_ns(CLOCK_MONOTONIC) - began_ns >= took_ns:
            return


cdef void worker_forget_listeners(worker_t *worker, int n) noexcept nogil:
    # Events of listeners in this batch carry indexes of what was armed before.
    cdef int i
    for i in range(n):
        if worker.events[i].data.u64 >> 32 == TAG_LISTENER:
            worker.events[i].data.u64 = <uint64_t> TAG_WAKE << 32


cdef bint worker_is_behind(worker_t *worker, int n, uint64_t before_ms) noexcept nogil:
    # Whether it stood still (a stopped process, a machine that was paused) and has not heard yet all who have said something since:
    # nobody's time is up before that. `n`: events of this turn, -1 when a signal ended the wait. `before_ms`: when the turn before it
    # began. The first late turn proves nothing: it may have got its events before it stood still.
    cdef uint64_t due = wheel_next_ms(&worker.wheel)
    if due and worker.now_ms >= due + LATE_MS and (
        worker.late_turns == 0 or n < 0 or n == MAX_EVENTS or worker.heavy.n
    ):
        if worker.late_turns == 0:
            worker.stale_ms = before_ms
        worker.late_turns += 1
        return worker.late_turns < LATE_TURNS
    worker.late_turns = 0
    return False


cdef void worker_turn(worker_t *worker) noexcept nogil:
    # One turn: wait, adopt a new plan, serve events, then those that used up their budget, then streams that were held long enough,
    # then handshakes, then timers.
    cdef int n = worker_wait(worker)
    cdef plan_t *plan = <plan_t *> load_pointer(<void **> &worker.engine.plan)
    cdef uint64_t before_ms = worker.now_ms
    cdef uint64_t tag, count
    cdef uint32_t slot, last
    cdef int i
    worker.now_ns = clock_ns(CLOCK_MONOTONIC)
    worker.now_ms = worker.now_ns // 1000000
    worker.turns += 1
    doing(worker, DOING_TURN, 0)
    if plan != worker.plan:
        doing(worker, DOING_ADOPT, 0)
        worker_adopt(worker, plan)
        store_release(&worker.seen_generation, plan.generation)
        worker_forget_listeners(worker, n)
    elif worker.accept_paused_until_ms and worker.now_ms >= worker.accept_paused_until_ms:
        accept_resume(worker)
    if load(&worker.engine.accept_mode) != worker.accept_mode:
        doing(worker, DOING_ACCEPT, 0)
        worker_set_accept_mode(worker, load(&worker.engine.accept_mode))
        worker_forget_listeners(worker, n)
    if worker.sweep_end == 0 and load_acquire(&worker.engine.sweep) != worker.sweep:
        worker_begin_sweep(worker)
    for i in range(n):
        tag = worker.events[i].data.u64
        if tag >> 32 == TAG_LISTENER:
            if worker.accept_paused_until_ms == 0:
                doing(worker, DOING_ACCEPT, <uint32_t> tag)
                listener_accept(worker, <uint32_t> tag)
        elif tag >> 32 == TAG_WAKE:
            read(worker.wake_fd, &count, sizeof(count))
            worker.serving = worker.lines != NULL
        else:
            doing(worker, DOING_EVENT, tag >> 32)
            conn_event(worker, tag, worker.events[i].events, n > LANE_EVENTS)
    last = worker.ready.tail
    while worker.ready.head != WHEEL_NONE:
        slot = worker.ready.head
        doing(worker, DOING_READY, slot)
        queue_remove(worker, conn_at(worker, slot))
        if conn_at(worker, slot).state == CONN_RESETTING:
            conn_drain(worker, conn_at(worker, slot), slot)
        else:
            conn_relay(worker, conn_at(worker, slot), slot)
        if slot == last:
            break
    while worker.held.head != WHEEL_NONE and conn_at(worker, worker.held.head).held_until_ns <= worker.now_ns:
        doing(worker, DOING_HELD, worker.held.head)
        conn_relay(worker, conn_at(worker, worker.held.head), worker.held.head)
    worker_serve_heavy(worker)
    if not worker_is_behind(worker, n, before_ms):
        slot = wheel_expire(&worker.wheel, worker.now_ms)
        while slot != WHEEL_NONE:
            doing(worker, DOING_TIMER, slot)
            conn_timeout(worker, conn_at(worker, slot), slot)
            slot = wheel_expire(&worker.wheel, worker.now_ms)
    if worker.lanes.n:
        lanes_serve(worker, LANE_TURN)
    if worker.serving:
        worker_serve_lines(worker)
    if worker.sweep_end:
        doing(worker, DOING_SWEEP, 0)
        worker_sweep(worker)
    if load_acquire(<uint64_t *> &worker.page.state) == 1:
        doing(worker, DOING_PAGE, 0)
        worker_show_page(worker)
    if load_acquire(&worker.handover.asked):
        doing(worker, DOING_PAGE, 0)
        worker_handover(worker)


cdef void worker_end(worker_t *worker) noexcept nogil:
    # Ends what is left and gives back what the worker itself owns.
    cdef uint32_t slot
    cdef conn_t *conn
    for slot in range(worker.n_chunks * CONN_CHUNK):
        conn = conn_at(worker, slot)
        if conn.state == CONN_FREE:
            continue
        doing(worker, DOING_END, slot)
        if conn.state == CONN_ARRIVING:
            conn_turn_away(worker, conn, slot)
        elif conn.state == CONN_DEPARTING:
            conn_forget(worker, conn, slot)
        else:
            conn_finish(worker, conn, slot, CLOSE_SHUTDOWN, True)
    while worker.n_pool:
        worker.n_pool -= 1
        pipe_close(worker, &worker.pool[worker.n_pool])
    sessions_free(worker)


cdef int worker_run(worker_t *worker) noexcept nogil:
    worker.now_ns = clock_ns(CLOCK_MONOTONIC)
    worker.now_ms = worker.now_ns // 1000000
    wheel_init(&worker.wheel, worker.now_ms, conn_timer, worker)
    watch_allow_stack()
    store(&worker.tid, l4_thread_id())
    while not load(&worker.engine.stopping):
        worker_turn(worker)
    worker_end(worker)
    store(&worker.tid, 0)
    return 0


# -- the Python face ---------------------------------------------------------------------------------------------------------

include "_native/counters.pxi"
include "_native/buckets.pxi"
include "_native/gcm.pxi"
include "_native/p256.pxi"
include "_native/identity.pxi"
include "_native/plan.pxi"
include "_native/engine.pxi"
include "_native/handover.pxi"
