# Implementation, inlined into _fastpath: lists of connections, linked through their slots. A connection is on one at most.

from libc.stdint cimport uint8_t, uint32_t

from l4mesh._native.address cimport address_hash_ip, mix64
from l4mesh._native.slab cimport conn_at
from l4mesh._native.types cimport (
    LANES, LANE_HINTS, QUEUED_ASIDE, QUEUED_EVENT, QUEUED_HEAVY, QUEUED_HELD, QUEUED_READY, conn_t, queue_t, waiting_t, worker_t,
)
from l4mesh._native.wheel cimport WHEEL_NONE


cdef inline uint32_t conn_source(const worker_t *worker, const conn_t *conn) noexcept nogil:
    # By a secret, so that nobody can choose an address that shares another's turns.
    return <uint32_t> address_hash_ip(&conn.source, worker.engine.seed) % LANES


cdef inline uint32_t conn_lane(const worker_t *worker, const conn_t *conn) noexcept nogil:
    return <uint32_t> address_hash_ip(&conn.source, worker.engine.seed + conn.lane_hint) % LANES


cdef inline uint8_t lane_hint(const worker_t *worker, const conn_t *conn) noexcept nogil:
    # For who takes the connection next; by a secret of its own, since it is sent.
    return <uint8_t> (1 + address_hash_ip(&conn.source, mix64(worker.engine.seed)) % LANE_HINTS)


cdef inline queue_t *queue_of(worker_t *worker, const conn_t *conn, uint8_t which) noexcept nogil:
    if which == QUEUED_READY:
        return &worker.ready
    if which == QUEUED_HELD:
        return &worker.held
    if which == QUEUED_ASIDE:
        return &worker.lanes.accepted[conn_lane(worker, conn)]
    if which == QUEUED_EVENT:
        return &worker.lanes.begun[conn_lane(worker, conn)]
    if which == QUEUED_HEAVY:
        return &worker.heavy.begun[conn_lane(worker, conn)]
    return &(<waiting_t *> conn.cluster_stat.rows[worker.index].line).queue


cdef inline void queue_push(worker_t *worker, conn_t *conn, uint32_t slot, uint8_t which) noexcept nogil:
    # To the end of the list QUEUED_`which`.
    cdef queue_t *queue
    if conn.queued:
        return
    queue = queue_of(worker, conn, which)
    conn.queued = which
    conn.queue_next = WHEEL_NONE
    conn.queue_prev = queue.tail
    if queue.tail == WHEEL_NONE:
        queue.head = slot
    else:
        conn_at(worker, queue.tail).queue_next = slot
    queue.tail = slot


cdef inline void queue_remove(worker_t *worker, conn_t *conn) noexcept nogil:
    # From whatever list it is on.
    cdef queue_t *queue
    if not conn.queued:
        return
    queue = queue_of(worker, conn, conn.queued)
    if conn.queued == QUEUED_ASIDE or conn.queued == QUEUED_EVENT:
        worker.lanes.n -= 1
    elif conn.queued == QUEUED_HEAVY:
        worker.heavy.n -= 1
    conn.queued = 0
    if conn.queue_prev == WHEEL_NONE:
        queue.head = conn.queue_next
    else:
        conn_at(worker, conn.queue_prev).queue_next = conn.queue_next
    if conn.queue_next == WHEEL_NONE:
        queue.tail = conn.queue_prev
    else:
        conn_at(worker, conn.queue_next).queue_prev = conn.queue_prev
