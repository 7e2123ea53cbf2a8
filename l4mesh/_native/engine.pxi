# Part of _fastpath: the workers, as Python starts, feeds and asks them.


cdef str address_text(const address_t *address):
    cdef char text[64]
    if address.port == 0 and ip_is_unspecified(address):
        return ""
    if address_is_v4(address):
        inet_ntop(AF_INET, &address.ip[12], text, sizeof(text))
        return f"{text.decode()}:{address.port}"
    inet_ntop(AF_INET6, address.ip, text, sizeof(text))
    return f"[{text.decode()}]:{address.port}"


cdef str text_or_empty(const char *text):
    return text.decode("ascii", "replace") if text != NULL else ""


cdef bint host_paces() noexcept nogil:
    cdef char name[16]
    cdef socklen_t size = sizeof(name)
    cdef int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)
    cdef bint paces = getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, &size) == 0 and memcmp(name, b"bbr", 3) == 0
    if fd >= 0:
        close(fd)
    return paces


cdef class Engine:
    """The workers and what they share. Owns their memory; the control loop owns the listening sockets."""

    cdef engine_t engine
    cdef worker_t **workers
    cdef ClusterStat no_cluster
    cdef object plan
    cdef object retired
    cdef uint32_t max_connections
    cdef BIO_METHOD *bio_method

    def __cinit__(self, uint32_t n_workers, uint32_t max_connections, list seeds not None, uint32_t ring_records=8192):
        """``max_connections``: the most that one worker's table can hold. ``seeds``: a random number other than 0 for each
        worker. ``ring_records``: a power of two. Raises OSError when descriptors run out."""
        cdef uint32_t i
        if ring_records & (ring_records - 1) or n_workers == 0:
            raise ValueError("ring_records must be a power of two and n_workers at least 1")
        self.no_cluster = ClusterStat(0, n_workers, [0] * n_workers)
        self.engine.no_cluster = self.no_cluster.stat
        self.engine.up_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        self.engine.watch_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if self.engine.up_fd < 0 or self.engine.watch_fd < 0:
            raise OSError(errno, "eventfd")
        self.engine.sources = <sources_t *> memory(sizeof(sources_t))
        self.engine.handshakes = <sources_t *> memory(sizeof(sources_t))
        self.engine.given = <SSL_SESSION **> memory(GIVEN * sizeof(void *))
        self.engine.revocation_seed = mix64(<uint64_t> seeds[0] ^ <uint64_t> 0x5bf0a8b1457695b3)
        self.engine.paces = host_paces()
        self.engine.seed = mix64(<uint64_t> seeds[0] ^ <uint64_t> 0x9e3779b97f4a7c15)
        self.engine.sources.seed = self.engine.handshakes.seed = self.engine.seed
        self.engine.wake_fds = <int *> calloc(n_workers, sizeof(int))
        if self.engine.wake_fds == NULL:
            raise MemoryError
        self.bio_method = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, b"l4mesh")
        if self.bio_method == NULL:
            raise MemoryError
        BIO_meth_set_read(self.bio_method, tls_bio_read)
        BIO_meth_set_write(self.bio_method, tls_bio_write)
        BIO_meth_set_ctrl(self.bio_method, tls_bio_ctrl)
        self.max_connections = max_connections
        self.workers = <worker_t **> calloc(n_workers, sizeof(void *))
        if self.workers == NULL:
            raise MemoryError
        for i in range(n_workers):
            self.workers[i] = <worker_t *> memory(sizeof(worker_t))
            self.engine.n_workers += 1
            self.open_worker(self.workers[i], i, <uint64_t> seeds[i], ring_records)

    cdef int open_worker(self, worker_t *worker, uint32_t index, uint64_t seed, uint32_t ring_records) except -1:
        cdef epoll_event event
        worker.engine = &self.engine
        worker.index = index
        worker.random = seed | 1
        worker.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        worker.wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if worker.epoll_fd < 0 or worker.wake_fd < 0:
            raise OSError(errno, "epoll_create1 or eventfd")
        self.engine.wake_fds[index] = worker.wake_fd
        event.events = EPOLLIN
        event.data.u64 = <uint64_t> TAG_WAKE << 32
        if epoll_ctl(worker.epoll_fd, EPOLL_CTL_ADD, worker.wake_fd, &event) != 0:
            raise OSError(errno, "epoll_ctl")
        worker.scratch = <uint8_t *> memory(SCRATCH_BYTES)
        worker.plain = <uint8_t *> memory(PLAIN_BYTES)
        worker.cipher = <uint8_t *> memory(CIPHER_BYTES)
        worker.feed = <uint8_t *> memory(TLS_LARGE_BYTES)
        worker.bio = BIO_new(self.bio_method)
        if worker.bio == NULL:
            raise MemoryError
        BIO_set_data(worker.bio, worker)
        BIO_set_init(worker.bio, 1)
        worker.free_slot = WHEEL_NONE
        worker.ready.head = worker.ready.tail = WHEEL_NONE
        worker.held.head = worker.held.tail = WHEEL_NONE
        lanes_init(&worker.lanes)
        lanes_init(&worker.heavy)
        worker.max_chunks = (self.max_connections + CONN_CHUNK - 1) // CONN_CHUNK
        worker.chunks = <conn_t **> memory(worker.max_chunks * sizeof(void *))
        worker.ring.records = <record_t *> memory(ring_records * sizeof(record_t))
        worker.ring.mask = ring_records - 1
        worker.ring.parked = 1
        return 0

    def __dealloc__(self):
        cdef uint32_t i, j
        cdef worker_t *worker
        if self.workers != NULL:
            for i in range(self.engine.n_workers):
                worker = self.workers[i]
                for j in range(worker.n_chunks):
                    free(worker.chunks[j])
                free(worker.chunks)
                free(worker.scratch)
                free(worker.plain)
                free(worker.cipher)
                free(worker.feed)
                free(worker.sessions)
                free(worker.chains)
                BIO_free(worker.bio)
                free(worker.ring.records)
                free(worker.page.views)
                if worker.epoll_fd > 0:
                    close(worker.epoll_fd)
                if worker.wake_fd > 0:
                    close(worker.wake_fd)
                free(worker)
            free(self.workers)
        free(self.engine.sources)
        free(self.engine.handshakes)
        given_free(&self.engine)
        free(self.engine.given)
        free(self.engine.wake_fds)
        free(self.engine.arrivals)
        BIO_meth_free(self.bio_method)
        if self.engine.up_fd > 0:
            close(self.engine.up_fd)
        if self.engine.watch_fd > 0:
            close(self.engine.watch_fd)

    def fileno(self) -> int:
        """An eventfd that becomes readable when records or a page wait. Read it, then drain."""
        return self.engine.up_fd

    def run(self, uint32_t index) -> None:
        """Is worker ``index`` until ``stop()``: call it on a thread of its own, with signals blocked."""
        cdef worker_t *worker = self.workers[index]
        with nogil:
            worker_run(worker)

    cdef void wake(self) noexcept:
        cdef uint64_t one = 1
        cdef uint32_t i
        for i in range(self.engine.n_workers):
            write(self.workers[i].wake_fd, &one, sizeof(one))

    def publish(self, Plan plan not None) -> None:
        """Makes ``plan`` the one that new connections see. Raises RuntimeError while an older plan waits to be collected: no
        more than two are ever alive."""
        if self.retired is not None:
            raise RuntimeError("the plan before is still in use: collect() first")
        if plan.n_workers != self.engine.n_workers:
            raise ValueError("the plan is made for another number of workers")
        self.add_arrivals(plan)
        self.retired = self.plan
        self.plan = plan
        store_pointer(<void **> &self.engine.plan, plan.plan)
        self.wake()

    cdef int add_arrivals(self, Plan plan) except -1:
        # Before the plan that needs them is published; they stay.
        cdef uint32_t i
        cdef bint needed = rates_by_key(&plan.plan.arrival_rates)
        for i in range(plan.plan.n_listeners):
            needed |= rates_by_key(&plan.plan.listeners[i].arrival_rates)
        if needed and self.engine.arrivals == NULL:
            self.engine.arrivals = <arrivals_t *> memory(sizeof(arrivals_t))
            self.engine.arrivals.seed = self.engine.seed
        return 0

    def offer_places(self) -> None:
        """Lets every worker look for places for connections that wait: endpoints may serve that did not."""
        self.wake()

    @property
    def rate_overflows(self) -> int:
        """Connections whose source, workload or identity found no bucket of its own."""
        return load_u(&self.engine.arrivals.overflows) if self.engine.arrivals != NULL else 0

    def collect(self) -> bool:
        """Frees the plan before when no worker can see it any more; true when there is none left."""
        cdef uint32_t i
        if self.plan is not None:
            for i in range(self.engine.n_workers):
                if load_acquire(&self.workers[i].seen_generation) < (<Plan> self.plan).plan.generation:
                    return False
        self.retired = None
        return True

    @property
    def plans_alive(self) -> int:
        return (self.plan is not None) + (self.retired is not None)

    @property
    def revocation_seed(self) -> int:
        """For ``Plan.set_revoked``."""
        return self.engine.revocation_seed

    def read_tls(self, uint32_t index) -> tuple[list[list[int]], list[list[int]], int]:
        """Of one worker: handshakes as [side][resumed], failures as [side][cause], dry-run denials; side 0 is downstream."""
        cdef worker_t *worker = self.workers[index]
        cdef int i, j
        return (
            [[load_u(&worker.handshakes[i][j]) for j in range(2)] for i in range(2)],
            [[load_u(&worker.tls_failures[i][j]) for j in range(<int> TLS_CAUSES)] for i in range(2)],
            load_u(&worker.dry_denied),
        )

    def leave(self, list endpoints not None, int reason, uint32_t over_ms) -> None:
        """Connections of ``endpoints``, (EndpointStat, per mille of them), end for ``reason``, each at a moment of its own within
        ``over_ms``. With 1000 those that are made later as well, until ``EndpointStat.stay``."""
        cdef EndpointStat endpoint
        for endpoint, permille in endpoints:
            if permille < 1000 and endpoint.stat.leave_reason and endpoint.stat.leave_permille == 1000:
                # All of them leave already, for a reason that would not stand any more.
                continue
            endpoint.stat.leave_over_ms = over_ms
            endpoint.stat.leave_permille = permille
            endpoint.stat.leave_sweep = self.engine.sweep + 1
            endpoint.stat.leave_reason = <uint8_t> reason
        self.sweep()

    def leave_all(self, int reason, uint32_t over_ms) -> None:
        """The same for every connection. Reason 0 calls it off."""
        self.engine.leave_over_ms = over_ms
        self.engine.leave_reason = <uint8_t> reason
        self.sweep()

    cdef void sweep(self) noexcept:
        store_release(&self.engine.sweep, self.engine.sweep + 1)
        self.wake()

    def shed(self, int64_t idle_cap_ms, int64_t source_share, int64_t accept_budget, bint sweep) -> None:
        """What the workers do about overload from now on. Connections that have been idle for longer than ``idle_cap_ms`` end when
        ``sweep`` makes the workers look; a source may have ``source_share`` live connections; a worker accepts ``accept_budget``
        between two pauses. 0 is off, for each."""
        store(&self.engine.idle_cap_ms, idle_cap_ms)
        store(&self.engine.source_share, source_share)
        store(&self.engine.accept_budget, accept_budget)
        if sweep:
            self.sweep()

    @property
    def swept(self) -> bool:
        """Whether every worker has looked at all connections since the last sweep was asked for."""
        cdef uint32_t i
        for i in range(self.engine.n_workers):
            if load_acquire(&self.workers[i].sweep) != self.engine.sweep or self.workers[i].sweep_end:
                return False
        return True

    def read_shed(self, uint32_t index) -> tuple[int, int, int, int]:
        """Of one worker: idle connections ended, connections of the worst sources refused, pauses of accepting; and bytes of its
        table of connections that hold none."""
        cdef worker_t *worker = self.workers[index]
        return (
            load_u(&worker.shed[<int> SHED_IDLE]), load_u(&worker.shed[<int> SHED_SOURCE]), load_u(&worker.shed[<int> SHED_ACCEPTS]),
            (<int64_t> worker.n_chunks * CONN_CHUNK - load(&worker.active)) * <int64_t> sizeof(conn_t),
        )

    def measure_sources(self) -> list[tuple[int, int]]:
        """(Live connections, sources that have as many), ascending; above 16 within 6 %. Of connections that were counted: those of
        a time with a source limit or a share."""
        cdef uint64_t sources[SHARE_BUCKETS]
        cdef uint32_t i
        memset(sources, 0, sizeof(sources))
        with nogil:
            sources_measure(self.engine.sources, sources)
        return [(share_least(i), sources[i]) for i in range(SHARE_BUCKETS) if sources[i]]

    def set_accept_mode(self, int64_t mode) -> None:
        """0: accept. 1: accept what waits, then no more. 2: leave what waits to somebody else who has the sockets."""
        store(&self.engine.accept_mode, mode)
        self.wake()

    @property
    def accept_mode_seen(self) -> bool:
        """Whether every worker does as ``set_accept_mode`` said."""
        cdef uint32_t i
        for i in range(self.engine.n_workers):
            if load_acquire(<uint64_t *> &self.workers[i].accept_mode) != <uint64_t> self.engine.accept_mode:
                return False
        return True

    def stop(self) -> None:
        """Makes every ``run()`` end its connections and return."""
        store(&self.engine.stopping, 1)
        self.wake()

    def watch(self, uint32_t limit_ms, int stacks_signal) -> None:
        """Is the watchdog until ``end_watch()``: call it on a thread of its own, with signals blocked, from when the workers run.
        Ends the process when a worker is stuck for ``limit_ms``. When the control loop is, it gets ``stacks_signal``, which must
        write the stacks of Python's threads, and ten times as long."""
        cdef watched_t *watched = <watched_t *> memory((self.engine.n_workers + 1) * sizeof(watched_t))
        with nogil:
            watch(&self.engine, self.workers, watched, limit_ms, stacks_signal)
        free(watched)

    def end_watch(self) -> None:
        cdef uint64_t one = 1
        write(self.engine.watch_fd, &one, sizeof(one))

    def beat(self) -> None:
        """The calling thread is the control loop's and has come round; from now on it must do so again and again."""
        self.engine.loop_tid = l4_thread_id()
        add_u(&self.engine.beats, 1)

    def rest(self) -> None:
        """The control loop need not come round any more."""
        store_u(&self.engine.beats, 0)

    @property
    def active(self) -> int:
        return load(&self.engine.active)

    def read_no_cluster(self) -> tuple[int, int, list[int], int, int, int, int, int, list[int], list[int]]:
        """The counters of connections that ended before a cluster was known, as ``ClusterStat.read``."""
        return self.no_cluster.read()

    def read_worker(self, uint32_t index) -> tuple[int, int, int, bool, int, int, int, int, int, int, int, int]:
        """Active, accepted, accept pauses, paused, records dropped, pipes, turns, bytes copied, bytes spliced, holds, throttles, put
        aside."""
        cdef worker_t *worker = self.workers[index]
        return (
            load(&worker.active), load_u(&worker.accepted), load_u(&worker.accept_pauses),
            load_u(&worker.accept_paused_until_ms) != 0, load_u(&worker.ring.dropped), load_u(&worker.pipes),
            load_u(&worker.turns), load_u(&worker.bytes_copied), load_u(&worker.bytes_spliced),
            load_u(&worker.holds), load_u(&worker.throttles), load_u(&worker.put_aside),
        )

    def take_records(self, uint32_t index, int limit) -> list[tuple[object, ...]]:
        """Up to ``limit`` records of one worker, oldest first: (unix ms, listener id, cluster id, endpoint, source, destination,
        reason, attempts, errno, connect us, first byte us, total us, bytes to upstream, to downstream, downstream rtt us,
        retransmits, upstream rtt us, retransmits, downstream identity, TLS 1.x, resumed, upstream identity, TLS 1.x, resumed,
        TLS cause, alert, policy id, dry-run policy id, fault, ms in the queue)."""
        cdef ring_t *ring = &self.workers[index].ring
        cdef record_t *r
        cdef list records = []
        while limit > 0:
            r = ring_peek(ring)
            if r == NULL:
                break
            records.append((
                r.ended_unix_ms, r.listener_id, r.cluster_id, address_text(&r.endpoint), address_text(&r.source),
                address_text(&r.destination), r.reason, r.attempts, r.errno_seen, r.connect_us, r.first_byte_us, r.total_us,
                r.bytes_to_upstream, r.bytes_to_downstream, r.downstream_rtt_us, r.downstream_retransmits,
                r.upstream_rtt_us, r.upstream_retransmits, text_or_empty(r.peers[0]), r.versions[0], bool(r.resumed[0]),
                text_or_empty(r.peers[1]), r.versions[1], bool(r.resumed[1]), r.cause, r.alert, r.policy, r.dry_policy, r.fault,
                r.queued_ms,
            ))
            free(r.peers[0])
            free(r.peers[1])
            ring_pop(ring)
            limit -= 1
        return records

    def park_records(self, uint32_t index) -> bool:
        """Makes the eventfd tell of the next record of one worker; false when it is there already. Until then it doesn't."""
        return ring_park(&self.workers[index].ring)

    def take_told(self) -> list[int]:
        """Ids of the endpoints that have failed as often in a row as their clusters put up with, since the last call. The eventfd wakes
        for them."""
        cdef endpoint_stat_t *stat
        cdef list ids = []
        if load_pointer(<void **> &self.engine.told) == NULL:
            return ids
        stat = outlier_take(&self.engine)
        while stat != NULL:
            ids.append(stat.id)
            stat = outlier_next(stat)
        return ids

    def ask_page(self, uint32_t index, uint32_t start, uint32_t limit) -> None:
        """Asks worker ``index`` for live connections from slot ``start`` on; ``take_page`` has them after the eventfd wakes."""
        cdef worker_t *worker = self.workers[index]
        cdef uint64_t one = 1
        if load(&worker.page.state) != 0:
            raise RuntimeError("the page before was not taken")
        free(worker.page.views)
        worker.page.views = <view_t *> malloc(limit * sizeof(view_t))
        if worker.page.views == NULL:
            raise MemoryError
        worker.page.start = start
        worker.page.limit = limit
        store_release(<uint64_t *> &worker.page.state, 1)
        write(worker.wake_fd, &one, sizeof(one))

    def take_page(self, uint32_t index) -> tuple[list[tuple[object, ...]], int] | None:
        """None until the worker has answered; then (slot, generation, state, spliced, listener id, cluster id, source,
        destination, endpoint, age ms, idle ms, bytes to upstream, to downstream, downstream identity, TLS 1.x, upstream identity,
        TLS 1.x) for each, and the next slot or 0."""
        cdef page_t *page = &self.workers[index].page
        cdef view_t *v
        cdef uint32_t i
        cdef list views = []
        if load_acquire(<uint64_t *> &page.state) != 2:
            return None
        for i in range(page.count):
            v = &page.views[i]
            views.append((
                v.slot, v.generation, v.state, bool(v.spliced), v.listener_id, v.cluster_id, address_text(&v.source),
                address_text(&v.destination), address_text(&v.endpoint), v.age_ms, v.idle_ms, v.bytes_to_upstream,
                v.bytes_to_downstream, text_or_empty(v.peers[0]), v.versions[0], text_or_empty(v.peers[1]), v.versions[1],
            ))
            free(v.peers[0])
            free(v.peers[1])
        free(page.views)
        page.views = NULL
        store(&page.state, 0)
        return views, page.next


def connection_size() -> int:
    """User memory of an idle connection, bytes."""
    return sizeof(conn_t)


def close_reasons() -> dict[str, int]:
    """The numbers that the compiled code uses for ``errors.CloseReason``."""
    return {
        "DOWNSTREAM_CLOSED": CLOSE_DOWNSTREAM_CLOSED, "UPSTREAM_CLOSED": CLOSE_UPSTREAM_CLOSED,
        "DOWNSTREAM_RESET": CLOSE_DOWNSTREAM_RESET, "UPSTREAM_RESET": CLOSE_UPSTREAM_RESET,
        "DOWNSTREAM_LOST": CLOSE_DOWNSTREAM_LOST, "UPSTREAM_LOST": CLOSE_UPSTREAM_LOST,
        "DOWNSTREAM_LEFT": CLOSE_DOWNSTREAM_LEFT, "IDLE_TIMEOUT": CLOSE_IDLE_TIMEOUT,
        "HALF_CLOSED_TIMEOUT": CLOSE_HALF_CLOSED_TIMEOUT, "LIFETIME": CLOSE_LIFETIME,
        "CONNECT_REFUSED": CLOSE_CONNECT_REFUSED, "CONNECT_TIMEOUT": CLOSE_CONNECT_TIMEOUT,
        "CONNECT_UNREACHABLE": CLOSE_CONNECT_UNREACHABLE, "CONNECT_FAILED": CLOSE_CONNECT_FAILED,
        "NO_ROUTE": CLOSE_NO_ROUTE, "NO_ENDPOINT": CLOSE_NO_ENDPOINT,
        "NO_ORIGINAL_DESTINATION": CLOSE_NO_ORIGINAL_DESTINATION, "SELF_CALL": CLOSE_SELF_CALL,
        "LIMIT_LISTENER": CLOSE_LIMIT_LISTENER, "LIMIT_CLUSTER": CLOSE_LIMIT_CLUSTER,
        "LIMIT_ENDPOINT": CLOSE_LIMIT_ENDPOINT, "LIMIT_SOURCE": CLOSE_LIMIT_SOURCE,
        "PROXY_PROTOCOL_INVALID": CLOSE_PROXY_PROTOCOL_INVALID, "PROXY_PROTOCOL_TIMEOUT": CLOSE_PROXY_PROTOCOL_TIMEOUT,
        "LOCAL_EXHAUSTED": CLOSE_LOCAL_EXHAUSTED, "SHUTDOWN": CLOSE_SHUTDOWN, "DOWNSTREAM_TLS": CLOSE_DOWNSTREAM_TLS,
        "UPSTREAM_TLS": CLOSE_UPSTREAM_TLS, "DENIED": CLOSE_DENIED, "NO_IDENTITY": CLOSE_NO_IDENTITY,
        "PEER_CERTIFICATE": CLOSE_PEER_CERTIFICATE, "LIMIT_HANDSHAKES": CLOSE_LIMIT_HANDSHAKES,
        "LIMIT_RATE": CLOSE_LIMIT_RATE, "QUEUE_TIMEOUT": CLOSE_QUEUE_TIMEOUT, "OVERLOAD": CLOSE_OVERLOAD,
        "ENDPOINT_REMOVED": CLOSE_ENDPOINT_REMOVED, "ENDPOINT_UNHEALTHY": CLOSE_ENDPOINT_UNHEALTHY,
        "REBALANCED": CLOSE_REBALANCED, "HANDED_OVER": CLOSE_HANDED_OVER, "FAULT": CLOSE_FAULT,
    }


def faults() -> dict[str, int]:
    """The numbers that the compiled code uses for ``errors.Fault``."""
    return {
        "NONE": FAULT_NONE, "DELAY": FAULT_DELAY, "REFUSE": FAULT_REFUSE, "RESET": FAULT_RESET, "BLACK_HOLE": FAULT_BLACK_HOLE,
        "SLOW": FAULT_SLOW, "STALL": FAULT_STALL,
    }


def tls_causes() -> dict[str, int]:
    """The numbers that the compiled code uses for ``errors.TlsCause``."""
    return {
        "OK": TLS_OK, "NO_CERTIFICATE": TLS_NO_CERTIFICATE, "UNKNOWN_CA": TLS_UNKNOWN_CA, "EXPIRED": TLS_EXPIRED,
        "NOT_YET_VALID": TLS_NOT_YET_VALID, "REVOKED": TLS_REVOKED, "WRONG_IDENTITY": TLS_WRONG_IDENTITY,
        "BAD_CERTIFICATE": TLS_BAD_CERTIFICATE, "NOT_TLS": TLS_NOT_TLS, "PROTOCOL_VERSION": TLS_PROTOCOL_VERSION,
        "NO_COMMON_PARAMETERS": TLS_NO_COMMON_PARAMETERS, "BAD_RECORD": TLS_BAD_RECORD, "TRUNCATED": TLS_TRUNCATED,
        "TIMEOUT": TLS_TIMEOUT, "PEER_ALERT": TLS_PEER_ALERT, "KEY_UPDATES": TLS_KEY_UPDATES, "INTERNAL": TLS_INTERNAL,
    }


def openssl_version() -> str:
    """The library in use, as it names itself, and whose AES-GCM where that is not its own."""
    cdef str version = (<const char *> OpenSSL_version(0)).decode()
    tls_library()
    if gcm_library.name != NULL:
        version += f", AES-GCM of {gcm_library.name.decode()} {gcm_library.version.decode()}"
    return version


def tls_library_address() -> int:
    """Where the OSSL_LIB_CTX of handshakes and records is, 0 for the default one: for tests, which call it through ctypes."""
    return <size_t> tls_library()
