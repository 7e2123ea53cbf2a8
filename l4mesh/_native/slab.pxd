# Implementation, inlined into _fastpath: the connections of one worker.
#
# Slots are allocated in chunks that never move, so that a pointer to a connection stays good for as long as the connection is;
# its generation, kept over reuse, tells it from an earlier one in the same slot.

from libc.stdint cimport uint32_t
from libc.stdlib cimport calloc
from libc.string cimport memset

from l4mesh._native.types cimport CONN_CHUNK, CONN_FREE, conn_t, worker_t
from l4mesh._native.wheel cimport WHEEL_NONE, timer_t


cdef inline conn_t *conn_at(const worker_t *worker, uint32_t slot) noexcept nogil:
    return &worker.chunks[slot // CONN_CHUNK][slot % CONN_CHUNK]


cdef inline timer_t *conn_timer(void *worker, uint32_t slot) noexcept nogil:
    return &conn_at(<worker_t *> worker, slot).timer


cdef inline bint slab_grow(worker_t *worker) noexcept nogil:
    # One more chunk of free slots; false when memory or the table is used up.
    cdef conn_t *chunk
    cdef uint32_t i, first
    if worker.n_chunks == worker.max_chunks:
        return False
    chunk = <conn_t *> calloc(CONN_CHUNK, sizeof(conn_t))
    if chunk == NULL:
        return False
    first = worker.n_chunks * CONN_CHUNK
    worker.chunks[worker.n_chunks] = chunk
    worker.n_chunks += 1
    for i in range(CONN_CHUNK):
        chunk[i].queue_next = worker.free_slot if i + 1 == CONN_CHUNK else first + i + 1
    worker.free_slot = first
    return True


cdef inline conn_t *slab_take(worker_t *worker, uint32_t *slot) noexcept nogil:
    # A zeroed connection with its new generation, or NULL: no memory.
    cdef conn_t *conn
    cdef uint32_t generation
    if worker.free_slot == WHEEL_NONE and not slab_grow(worker):
        return NULL
    slot[0] = worker.free_slot
    conn = conn_at(worker, slot[0])
    worker.free_slot = conn.queue_next
    generation = (conn.generation + 1) & 0xffffff
    memset(conn, 0, sizeof(conn_t))
    conn.generation = generation
    return conn


cdef inline void slab_give(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    conn.state = CONN_FREE
    conn.queue_next = worker.free_slot
    worker.free_slot = slot
