# Implementation, inlined into _fastpath: what an endpoint did wrong, for outlier detection (policy/outlier.py decides).
#
# A connection is judged once on each of two grounds. Making it: a dial or a handshake that fails through the endpoint's doing, or
# succeeds. Answering it: the first byte from upstream is a success, and so is to live for longer than the windows below; a failure is,
# before any byte of an answer and while the client is still there,
#   early reset  the endpoint reset it within a second (by default), asked or not;
#   no answer    the endpoint ended or reset it within a second (by default) although it had been sent something;
#   TLS          a TLS 1.3 endpoint refused our certificate, which it does after the handshake.
# The two grounds have a count in a row each: connects that go well must not hide that nothing is ever answered.
#
# Everything else judges nobody: local trouble, an attempt for which the dial had no time left, a client that ended first (health checks
# of others, one-way protocols, load testers that reset), an endpoint that ends unasked (a port that only shows that it is there; one
# that says the time has answered), our own timeouts, policies and injected faults.

from libc.stdint cimport uint64_t

from l4mesh._native.atomic cimport add_u, exchange, exchange_pointer, fence, load_pointer, load_u, replace_pointer, store, store_u
from l4mesh._native.linux cimport ENETDOWN, ENETUNREACH, ETIMEDOUT, write
from l4mesh._native.shaping cimport conn_is_faulted
from l4mesh._native.stats cimport (
    SIGNAL_CONNECT, SIGNAL_EARLY_RESET, SIGNAL_NO_ANSWER, SIGNAL_TLS, SIGNAL_TLS_LATE, endpoint_stat_t, outlier_t,
)
from l4mesh._native.types cimport (
    CLOSE_UPSTREAM_LOST, CLOSE_UPSTREAM_RESET, CLOSE_UPSTREAM_TLS, DOWNSTREAM, HALF_ENDED, TLS_INTERNAL, UPSTREAM, conn_t, engine_t,
    worker_t,
)


cdef inline bint outlier_watches(const outlier_t *outlier, int signal) noexcept nogil:
    return (load_u(&outlier.signals) >> signal) & 1


cdef inline void outlier_tell(engine_t *engine, endpoint_stat_t *stat) noexcept nogil:
    # Puts the endpoint on the list, once, and wakes the control loop.
    cdef uint64_t one = 1
    cdef void *head
    if exchange(&stat.told, 1):
        return
    while True:
        head = load_pointer(<void **> &engine.told)
        stat.told_next = <endpoint_stat_t *> head
        if replace_pointer(<void **> &engine.told, head, stat):
            break
    # Who sees that no connection counts in the block any more must see that it is on the list.
    fence()
    write(engine.up_fd, &one, sizeof(one))


cdef inline endpoint_stat_t *outlier_take(engine_t *engine) noexcept nogil:
    # All that were told since, linked through `told_next`, the newest first.
    return <endpoint_stat_t *> exchange_pointer(<void **> &engine.told, NULL)


cdef inline endpoint_stat_t *outlier_next(endpoint_stat_t *stat) noexcept nogil:
    # The one behind it; `stat` itself may be told again from now on.
    cdef endpoint_stat_t *following = stat.told_next
    exchange(&stat.told, 0)
    return following


cdef inline void outlier_failed(worker_t *worker, conn_t *conn, int signal, uint64_t *in_a_row) noexcept nogil:
    add_u(&conn.endpoint_stat.failures[signal], 1)
    if add_u(in_a_row, 1) + 1 == load_u(&conn.cluster_stat.outlier.consecutive):
        outlier_tell(worker.engine, conn.endpoint_stat)


cdef inline void outlier_dial_failed(worker_t *worker, conn_t *conn, int error) noexcept nogil:
    # An attempt failed, and not through local trouble.
    cdef int signal = SIGNAL_TLS if conn.phase.dial.handshaking else SIGNAL_CONNECT
    if conn.endpoint_stat == NULL or not outlier_watches(&conn.cluster_stat.outlier, signal):
        return
    if signal == SIGNAL_TLS:
        if conn.side[UPSTREAM].tls.cause == TLS_INTERNAL:
            return
    elif error == ENETUNREACH or error == ENETDOWN:
        # Whatever is wrong, it is on our side of the endpoint.
        return
    elif error == ETIMEDOUT:
        # An attempt that the budget of them all cut short says nothing.
        if worker.now_ms - conn.phase.dial.attempt_started_ns // 1000000 < conn.phase.dial.cluster.settings.connect_timeout_ms:
            return
    outlier_failed(worker, conn, signal, &conn.endpoint_stat.failed_connects)


cdef inline void outlier_connected(conn_t *conn, uint64_t took_ns) noexcept nogil:
    if load_u(&conn.cluster_stat.outlier.signals) == 0:
        return
    add_u(&conn.endpoint_stat.connect_ns, took_ns)
    if load_u(&conn.endpoint_stat.failed_connects):
        store_u(&conn.endpoint_stat.failed_connects, 0)


cdef inline void outlier_answered(conn_t *conn) noexcept nogil:
    # The first byte, or a life beyond the windows.
    if load_u(&conn.cluster_stat.outlier.signals) == 0 or conn.endpoint_stat == NULL:
        return
    if load_u(&conn.endpoint_stat.failed_answers):
        store_u(&conn.endpoint_stat.failed_answers, 0)


cdef inline uint64_t outlier_lived_ms(const worker_t *worker, const conn_t *conn) noexcept nogil:
    # Since it was connected, which may have been later in this turn than the turn's own time.
    cdef uint64_t age_ns = worker.now_ns - conn.accepted_ns
    cdef uint64_t connected_ns = <uint64_t> conn.connected_us * 1000
    return (age_ns - connected_ns) // 1000000 if age_ns > connected_ns else 0


cdef inline void outlier_lived(const worker_t *worker, conn_t *conn) noexcept nogil:
    # Nothing has been said against it so far.
    cdef const outlier_t *outlier = &conn.cluster_stat.outlier
    cdef uint64_t lived = outlier_lived_ms(worker, conn)
    if lived >= load_u(&outlier.early_reset_ms) and lived >= load_u(&outlier.no_answer_ms):
        outlier_answered(conn)


cdef inline bint outlier_goes_unanswered(const conn_t *conn) noexcept nogil:
    # Whether the endpoint owes a client that is still there its first byte. One that an injected fault keeps waiting owes nothing.
    return (
        conn.endpoint_stat != NULL
        and not conn_is_faulted(conn)
        and conn.phase.half[UPSTREAM].bytes == 0
        and not conn.phase.half[DOWNSTREAM].flags & HALF_ENDED
    )


cdef inline void outlier_refused_tls(worker_t *worker, conn_t *conn) noexcept nogil:
    # After our handshake was over.
    if conn.endpoint_stat != NULL and outlier_watches(&conn.cluster_stat.outlier, SIGNAL_TLS):
        outlier_failed(worker, conn, SIGNAL_TLS_LATE, &conn.endpoint_stat.failed_answers)


cdef inline bint outlier_unanswered(worker_t *worker, conn_t *conn) noexcept nogil:
    # Counts an end in place of an answer. False: it is none, or nobody watches for that.
    cdef const outlier_t *outlier = &conn.cluster_stat.outlier
    if (
        not outlier_watches(outlier, SIGNAL_NO_ANSWER)
        or conn.phase.half[DOWNSTREAM].bytes == 0
        or outlier_lived_ms(worker, conn) >= load_u(&outlier.no_answer_ms)
    ):
        return False
    outlier_failed(worker, conn, SIGNAL_NO_ANSWER, &conn.endpoint_stat.failed_answers)
    return True


cdef inline void outlier_ended(worker_t *worker, conn_t *conn) noexcept nogil:
    # Upstream's FIN, before downstream's.
    if load_u(&conn.cluster_stat.outlier.signals) and outlier_goes_unanswered(conn):
        outlier_unanswered(worker, conn)


cdef inline void outlier_finished(worker_t *worker, conn_t *conn, int reason) noexcept nogil:
    # A connection that was made ends, still counted at its endpoint.
    cdef const outlier_t *outlier = &conn.cluster_stat.outlier
    if load_u(&outlier.signals) == 0 or not outlier_goes_unanswered(conn) or conn.phase.half[UPSTREAM].flags & HALF_ENDED:
        return
    if reason == CLOSE_UPSTREAM_RESET:
        if outlier_watches(outlier, SIGNAL_EARLY_RESET) and outlier_lived_ms(worker, conn) < load_u(&outlier.early_reset_ms):
            outlier_failed(worker, conn, SIGNAL_EARLY_RESET, &conn.endpoint_stat.failed_answers)
        elif not outlier_unanswered(worker, conn):
            outlier_lived(worker, conn)
    elif reason != CLOSE_UPSTREAM_LOST and reason != CLOSE_UPSTREAM_TLS:
        outlier_lived(worker, conn)
