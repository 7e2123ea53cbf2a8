# Implementation, inlined into _fastpath: a bounded single-producer, single-consumer ring of records.
#
# The newest record is dropped and counted when the ring is full: traffic never waits for a reader. Each side keeps a copy of the
# other's position, so that the shared cache lines move once a lap and not once a record. The worker writes the eventfd only when
# the reader said that it found the ring empty.

from libc.stdint cimport int64_t, uint64_t

from l4mesh._native.atomic cimport exchange, fence, load, load_acquire, store, store_release, store_u
from l4mesh._native.linux cimport write
from l4mesh._native.types cimport record_t, ring_t


cdef inline record_t *ring_claim(ring_t *ring) noexcept nogil:
    # The place for the next record, or NULL when the ring is full (counted). Publish it with ring_push.
    if ring.head - ring.tail_seen > ring.mask:
        ring.tail_seen = load_acquire(&ring.tail)
        if ring.head - ring.tail_seen > ring.mask:
            store_u(&ring.dropped, ring.dropped + 1)
            return NULL
    return &ring.records[ring.head & ring.mask]


cdef inline void ring_push(ring_t *ring, int up_fd) noexcept nogil:
    cdef uint64_t one = 1
    store_release(&ring.head, ring.head + 1)
    fence()
    if load(&ring.parked) and exchange(&ring.parked, 0):
        write(up_fd, &one, sizeof(one))


cdef inline record_t *ring_peek(ring_t *ring) noexcept nogil:
    # The oldest record, or NULL.
    return &ring.records[ring.tail & ring.mask] if load_acquire(&ring.head) != ring.tail else NULL


cdef inline bint ring_park(ring_t *ring) noexcept nogil:
    # The next push writes the eventfd. False: it has come already.
    store(&ring.parked, 1)
    fence()
    return load_acquire(&ring.head) == ring.tail


cdef inline void ring_pop(ring_t *ring) noexcept nogil:
    store_release(&ring.tail, ring.tail + 1)
