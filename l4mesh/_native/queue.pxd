# Implementation, inlined into _fastpath: lists of connections, linked through their slots. A connection is on one at most.

from libc.stdint cimport uint8_t, uint32_t

from l4mesh._native.slab cimport conn_at
from l4mesh._native.types cimport QUEUED_HEAVY, QUEUED_READY, conn_t, queue_t, worker_t
from l4mesh._native.wheel cimport WHEEL_NONE


cdef inline queue_t *queue_of(worker_t *worker, uint8_t which) noexcept nogil:
    if which == QUEUED_READY:
        return &worker.ready
    return &worker.heavy if which == QUEUED_HEAVY else &worker.held


cdef inline void queue_push(worker_t *worker, conn_t *conn, uint32_t slot, uint8_t which) noexcept nogil:
    # To the end of the list QUEUED_`which`.
    cdef queue_t *queue = queue_of(worker, which)
    if conn.queued:
        return
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
    cdef queue_t *queue = queue_of(worker, conn.queued)
    if not conn.queued:
        return
    conn.queued = 0
    if conn.queue_prev == WHEEL_NONE:
        queue.head = conn.queue_next
    else:
        conn_at(worker, conn.queue_prev).queue_next = conn.queue_next
    if conn.queue_next == WHEEL_NONE:
        queue.tail = conn.queue_prev
    else:
        conn_at(worker, conn.queue_next).queue_prev = conn.queue_prev
