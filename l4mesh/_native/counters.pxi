# Part of _fastpath: the counters that workers write and Python reads.


cdef void *memory(size_t size) except NULL:
    # Zeroed and aligned to a cache line, so that counters of different owners never share one.
    cdef void *block = NULL
    if posix_memalign(&block, 64, size) != 0:
        raise MemoryError
    memset(block, 0, size)
    return block


cdef void write_name(char *out, str name):
    # Whole characters, as many as there is room for.
    cdef bytes text = name.encode()[:NAME_BYTES - 1].decode(errors="ignore").encode()
    memcpy(out, <const char *> text, len(text))


cdef class EndpointStat:
    """Counters of one endpoint of one cluster. Keep it while a plan names the endpoint or ``active`` is not 0."""

    cdef endpoint_stat_t *stat
    cdef readonly uint64_t id

    def __cinit__(self, uint64_t id):
        self.stat = <endpoint_stat_t *> memory(sizeof(endpoint_stat_t))
        self.stat.id = id
        self.id = id

    def __dealloc__(self):
        # A block that a connection still counts in is left behind rather than pulled from under it.
        if self.stat != NULL and not self.in_use:
            free(self.stat)

    @property
    def active(self) -> int:
        return load(&self.stat.active)

    @property
    def in_use(self) -> bool:
        """Whether a connection counts in it, or the engine has yet to tell of it."""
        return load(&self.stat.active) != 0 or load(&self.stat.told) != 0

    @property
    def out(self) -> int:
        """Why workers pick it no more, a bit for each cause; 0: they do."""
        return load(&self.stat.out)

    @out.setter
    def out(self, int64_t causes) -> None:
        store(&self.stat.out, causes)

    @property
    def warm_until_ms(self) -> int:
        """The end of its slow start on the monotonic clock; 0 before it had one."""
        return load_u(&self.stat.warm_until_ms)

    def warm(self, uint64_t from_ms, uint64_t until_ms) -> None:
        """Slow start: its weight grows from a tenth at ``from_ms`` to the whole at ``until_ms``, on the monotonic clock."""
        store_u(&self.stat.warm_from_ms, from_ms)
        store_u(&self.stat.warm_until_ms, until_ms)

    def stay(self) -> None:
        """Calls ``Engine.leave`` off: connections that have not ended yet, stay."""
        self.stat.leave_reason = 0

    def read(self) -> tuple[int, int, int, int, int]:
        """Active, opened, connect failures, bytes to upstream, bytes to downstream."""
        return (
            load(&self.stat.active), load_u(&self.stat.opened), load_u(&self.stat.connect_failures),
            load_u(&self.stat.bytes_to_upstream), load_u(&self.stat.bytes_to_downstream),
        )

    def read_outlier(self) -> tuple[int, int, list[int], int, int]:
        """Opened, ns of the dials that succeeded, failures by signal; failed connects in a row, and failed answers."""
        cdef int i
        return (
            load_u(&self.stat.opened), load_u(&self.stat.connect_ns), [load_u(&self.stat.failures[i]) for i in range(<int> SIGNALS)],
            load_u(&self.stat.failed_connects), load_u(&self.stat.failed_answers),
        )

    def forget_failures(self) -> None:
        """Begins to count in a row anew."""
        store_u(&self.stat.failed_connects, 0)
        store_u(&self.stat.failed_answers, 0)


cdef class ClusterStat:
    """Counters of one cluster, a row for each worker. Keep it while a plan names the cluster or ``active`` is not 0."""

    cdef cluster_stat_t *stat
    cdef uint32_t n_workers
    cdef readonly uint64_t id

    def __cinit__(self, uint64_t id, uint32_t n_workers, list cursors, str name not None=""):
        """``cursors``: where each worker's round robin starts; random, so that many nodes don't start alike."""
        cdef uint32_t i
        cdef size_t head = (sizeof(cluster_stat_t) + 63) & ~<size_t> 63
        self.stat = <cluster_stat_t *> memory(head + n_workers * sizeof(cluster_row_t))
        self.stat.id = id
        write_name(self.stat.name, name)
        self.stat.rows = <cluster_row_t *> (<uint8_t *> self.stat + head)
        self.id = id
        self.n_workers = n_workers
        for i in range(n_workers):
            self.stat.rows[i].cursor = <uint64_t> cursors[i]

    def __dealloc__(self):
        if self.stat != NULL and self.active == 0:
            free(self.stat)

    @property
    def active(self) -> int:
        """Connections that may hold a pointer to the block: those that wait included."""
        # In this order: one that is served is counted in `active` before it is taken from `waiting`.
        cdef int64_t waiting = load_ordered(&self.stat.waiting)
        return waiting + load_ordered(&self.stat.active)

    @property
    def panic(self) -> bool:
        """Whether workers pick endpoints that are out as well."""
        return load(&self.stat.panic) != 0

    @panic.setter
    def panic(self, bint panic) -> None:
        store(&self.stat.panic, panic)

    def watch(self, uint64_t signals, uint64_t consecutive, uint64_t early_reset_ms, uint64_t no_answer_ms) -> None:
        """What workers watch the endpoints for: a bit set of SIGNAL_*, 0 for nothing; failures in a row of which ``Engine.take_told``
        tells, 0 for none; windows."""
        store_u(&self.stat.outlier.consecutive, consecutive)
        store_u(&self.stat.outlier.early_reset_ms, early_reset_ms)
        store_u(&self.stat.outlier.no_answer_ms, no_answer_ms)
        store_u(&self.stat.outlier.signals, signals)

    def read(self) -> tuple[int, int, list[int], int, int, int, int, int, list[int], list[int]]:
        """Active, opened, closed by reason, bytes to upstream and downstream, connect attempts, failures, ns, buckets, faults."""
        cdef uint32_t i
        cdef int j
        cdef cluster_row_t *row
        cdef uint64_t opened = 0, up = 0, down = 0, attempts = 0, failures = 0, ns = 0
        cdef uint64_t closed[CLOSE_REASONS]
        cdef uint64_t buckets[CONNECT_BUCKETS]
        cdef uint64_t faults[FAULT_KINDS]
        memset(faults, 0, sizeof(faults))
        memset(closed, 0, sizeof(closed))
        memset(buckets, 0, sizeof(buckets))
        for i in range(self.n_workers):
            row = &self.stat.rows[i]
            for j in range(CLOSE_REASONS):
                closed[j] += load_u(&row.closed[j])
            opened += load_u(&row.opened)
            up += load_u(&row.bytes_to_upstream)
            down += load_u(&row.bytes_to_downstream)
            attempts += load_u(&row.connect_attempts)
            failures += load_u(&row.connect_failures)
            ns += load_u(&row.connect_ns)
            for j in range(CONNECT_BUCKETS):
                buckets[j] += load_u(&row.connect_buckets[j])
            for j in range(FAULT_KINDS):
                faults[j] += load_u(&row.faults[j])
        return (
            load(&self.stat.active), opened, [closed[j] for j in range(CLOSE_REASONS)], up, down, attempts, failures, ns,
            [buckets[j] for j in range(CONNECT_BUCKETS)], [faults[j] for j in range(FAULT_KINDS)],
        )

    def read_limits(self) -> tuple[int, int, int, int, int]:
        """Waiting for a place, have waited, their ns, dialling again, retries that the budget refused."""
        cdef uint32_t i
        cdef uint64_t queued = 0, ns = 0, refused = 0
        for i in range(self.n_workers):
            queued += load_u(&self.stat.rows[i].queued)
            ns += load_u(&self.stat.rows[i].queued_ns)
            refused += load_u(&self.stat.rows[i].retries_refused)
        return load(&self.stat.waiting), queued, ns, load(&self.stat.retrying), refused


cdef class ListenerStat:
    """Counters of one listener, a row for each worker. Keep it while a plan names the listener or ``active`` is not 0."""

    cdef listener_stat_t *stat
    cdef uint32_t n_workers
    cdef readonly uint64_t id

    def __cinit__(self, uint64_t id, uint32_t n_workers, str name not None=""):
        cdef size_t head = (sizeof(listener_stat_t) + 63) & ~<size_t> 63
        self.stat = <listener_stat_t *> memory(head + n_workers * sizeof(listener_row_t))
        self.stat.id = id
        write_name(self.stat.name, name)
        self.stat.rows = <listener_row_t *> (<uint8_t *> self.stat + head)
        self.id = id
        self.n_workers = n_workers

    def __dealloc__(self):
        if self.stat != NULL and load(&self.stat.active) == 0:
            free(self.stat)

    @property
    def active(self) -> int:
        return load(&self.stat.active)

    def read(self) -> tuple[int, int, list[int]]:
        """Active, opened, closed by reason."""
        cdef uint32_t i
        cdef int j
        cdef uint64_t opened = 0
        cdef uint64_t closed[CLOSE_REASONS]
        memset(closed, 0, sizeof(closed))
        for i in range(self.n_workers):
            opened += load_u(&self.stat.rows[i].opened)
            for j in range(CLOSE_REASONS):
                closed[j] += load_u(&self.stat.rows[i].closed[j])
        return load(&self.stat.active), opened, [closed[j] for j in range(CLOSE_REASONS)]
