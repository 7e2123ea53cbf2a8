# Part of _fastpath: live connections on their way from one process to another, as Python steers them.

cdef enum:
    HANDOVER_WAIT_MS = 10000


cdef class Handover:
    """Steers one worker of ``engine`` while one process takes over from another. One call at a time, from any thread; each waits for
    the worker, which must be running, and raises TimeoutError when it does not answer within ten seconds.

    Between ``depart`` or ``arrive`` and ``settle`` the connections stand still.
    """

    cdef Engine engine
    cdef worker_t *worker
    cdef handover_t *handover
    cdef int done_fd

    def __cinit__(self, Engine engine not None, uint32_t index):
        if index >= engine.engine.n_workers:
            raise IndexError(index)
        self.done_fd = -1
        self.engine = engine
        self.worker = engine.workers[index]
        self.handover = &self.worker.handover
        if self.handover.passages != NULL:
            raise RuntimeError("the worker is steered already")
        self.done_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if self.done_fd < 0:
            raise OSError(errno, "eventfd")
        self.handover.done_fd = self.done_fd
        self.handover.passages = <passage_t *> calloc(PASSAGES, sizeof(passage_t))
        if self.handover.passages == NULL:
            raise MemoryError

    def __dealloc__(self):
        if self.done_fd >= 0:
            close(self.done_fd)
            free(self.handover.passages)
            self.handover.passages = NULL

    cdef int ask(self, uint64_t asked) except -1:
        cdef pollfd answer
        cdef uint64_t count
        cdef int ready
        if load_acquire(&self.handover.asked):
            raise RuntimeError("the worker has not answered the call before")
        # An answer that came when nobody waited any more.
        read(self.done_fd, &count, sizeof(count))
        answer.fd = self.done_fd
        answer.events = POLLIN
        store_release(&self.handover.asked, asked)
        self.engine.wake()
        while True:
            with nogil:
                ready = poll(&answer, 1, HANDOVER_WAIT_MS)
                while ready < 0 and errno == EINTR:
                    ready = poll(&answer, 1, HANDOVER_WAIT_MS)
            if ready > 0:
                break
            # A worker that is late must not begin what nobody will settle; to settle it is never too late.
            if asked == HANDOVER_SETTLE or swap_u(&self.handover.asked, asked, 0):
                raise TimeoutError("a worker has not come round for ten seconds")
        with nogil:
            while load_acquire(&self.handover.asked):
                sched_yield()
        return 0

    def depart(self, uint32_t start) -> tuple[list[tuple[bytes, list[int], int, int, str]], int]:
        """Takes plaintext relayed connections from slot ``start`` on out of the worker, a bounded number: for each its state and kept
        bytes, its descriptors (still the worker's), the ids of its listener and cluster, and the address of its endpoint ("": it has
        none that is counted); and the next slot or 0. Call ``settle`` next."""
        cdef passage_t *passage
        cdef uint32_t i
        cdef int h
        cdef list left = []
        cdef bytes state
        self.handover.start = start
        self.ask(HANDOVER_DEPART)
        for i in range(self.handover.count):
            passage = &self.handover.passages[i]
            state = (<const char *> &passage.state)[:sizeof(carried_t)]
            for h in range(2):
                if passage.parked[h] != NULL:
                    state += (<const char *> passage.parked[h])[:passage.state.half[h].parked_length]
            left.append((
                state, [passage.fds[h] for h in range(CARRIED_FDS) if passage.fds[h] >= 0], passage.listener_stat.id,
                passage.cluster_stat.id, address_text(&passage.state.endpoint) if passage.endpoint_stat != NULL else "",
            ))
        return left, self.handover.next

    def arrive(self, list connections not None) -> bool:
        """Brings connections in, each as (state and kept bytes, descriptors, ListenerStat, ClusterStat, EndpointStat or None) of what
        it counts in. False: no memory. Then, and after an error, the descriptors are the caller's; else they are the worker's. Call
        ``settle`` next. Raises ValueError for what ``depart`` did not give."""
        cdef uint32_t i
        if len(connections) > PASSAGES:
            raise ValueError(f"more than {<int> PASSAGES} connections")
        self.handover.count = <uint32_t> len(connections)
        try:
            for i in range(self.handover.count):
                memset(&self.handover.passages[i], 0, sizeof(passage_t))
            for i in range(self.handover.count):
                state, fds, listener, cluster, endpoint = connections[i]
                self.unpack(&self.handover.passages[i], state, fds, listener, cluster, endpoint)
            self.ask(HANDOVER_ARRIVE)
        except BaseException:
            self.drop_parked()
            self.handover.count = 0
            raise
        if not self.handover.flag:
            self.drop_parked()
            self.handover.count = 0
            return False
        return True

    cdef void drop_parked(self) noexcept:
        cdef uint32_t i
        cdef int h
        for i in range(self.handover.count):
            for h in range(2):
                free(self.handover.passages[i].parked[h])
                self.handover.passages[i].parked[h] = NULL

    cdef int unpack(
        self, passage_t *passage, bytes state, list fds, ListenerStat listener, ClusterStat cluster, EndpointStat endpoint
    ) except -1:
        cdef const char *rest = state
        cdef size_t length = len(state)
        cdef uint32_t parked
        cdef int h, i, next_fd = 2
        if length < sizeof(carried_t) or len(fds) < 2:
            raise ValueError("a connection is cut short")
        memcpy(&passage.state, rest, sizeof(carried_t))
        rest += sizeof(carried_t)
        length -= sizeof(carried_t)
        for i in range(CARRIED_FDS):
            passage.fds[i] = -1
        for h in range(2):
            passage.fds[h] = fds[h]
            if passage.state.half[h].piped:
                if len(fds) < next_fd + 2:
                    raise ValueError("a pipe is missing")
                passage.fds[2 + 2 * h] = fds[next_fd]
                passage.fds[3 + 2 * h] = fds[next_fd + 1]
                next_fd += 2
            parked = passage.state.half[h].parked_length
            if parked > length:
                raise ValueError("a connection is cut short")
            if parked:
                passage.parked[h] = <uint8_t *> malloc(parked)
                if passage.parked[h] == NULL:
                    raise MemoryError
                memcpy(passage.parked[h], rest, parked)
                rest += parked
                length -= parked
        if length or len(fds) != next_fd:
            raise ValueError("a connection has more than belongs to it")
        passage.listener_stat = listener.stat
        passage.cluster_stat = cluster.stat
        passage.endpoint_stat = endpoint.stat if endpoint is not None else NULL
        return 0

    def settle(self, bint go_on) -> None:
        """Lets the connections of the last ``depart`` or ``arrive`` go on in this process, or forgets them and closes their
        descriptors: the other one has them."""
        self.handover.flag = go_on
        self.ask(HANDOVER_SETTLE)


def carried_size() -> int:
    """Bytes of a connection's state as it crosses from one process to another."""
    return sizeof(carried_t)
