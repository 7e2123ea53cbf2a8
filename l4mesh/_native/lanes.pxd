# Implementation, inlined into _fastpath: whose turn it is when more is accepted than can be served.
#
# The kernel's queue is one for all sources, first in first out: behind one that opens hundreds of connections everybody else waits.
# So a deep queue is accepted at once and put aside in lanes by source, and the lanes are served in turn (stochastic fairness queueing,
# McKenney, INFOCOM 1990; the connection is the quantum, so that no deficit need be kept). Few are served in a turn of the worker,
# because what was served in one comes back with events in the next. While the queue is shallow nothing is put aside.

from libc.stdint cimport uint32_t

from l4mesh._native.queue cimport queue_push, queue_remove, source_lane
from l4mesh._native.slab cimport conn_at
from l4mesh._native.types cimport LANES, QUEUED_LANE, conn_t, lanes_t, worker_t
from l4mesh._native.wheel cimport WHEEL_NONE

cdef enum:
    LANE_DIRECT = 4              # accepted at one event that are served at once
    LANE_TURN = 2                # served of those put aside, in a turn of the worker
    LANES_FULL = 4096            # put aside; the rest stays with the kernel


cdef inline void lanes_init(lanes_t *lanes) noexcept nogil:
    cdef uint32_t i
    lanes.first = lanes.last = WHEEL_NONE
    for i in range(LANES):
        lanes.lanes[i].head = lanes.lanes[i].tail = WHEEL_NONE


cdef inline void lanes_append(lanes_t *lanes, uint32_t lane) noexcept nogil:
    lanes.following[lane] = WHEEL_NONE
    if lanes.last == WHEEL_NONE:
        lanes.first = lane
    else:
        lanes.following[lanes.last] = lane
    lanes.last = lane


cdef inline void lanes_push(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    # To the end of its source's lane.
    cdef uint32_t lane = source_lane(conn)
    if worker.lanes.lanes[lane].head == WHEEL_NONE:
        lanes_append(&worker.lanes, lane)
    queue_push(worker, conn, slot, QUEUED_LANE)
    worker.lanes.n += 1
    worker.put_aside += 1


cdef inline uint32_t lanes_pop(worker_t *worker) noexcept nogil:
    # The next connection, out of its lane; WHEEL_NONE: there is none.
    cdef lanes_t *lanes = &worker.lanes
    cdef uint32_t lane = lanes.first
    cdef uint32_t slot
    if lane == WHEEL_NONE:
        return WHEEL_NONE
    slot = lanes.lanes[lane].head
    queue_remove(worker, conn_at(worker, slot))
    lanes.n -= 1
    lanes.first = lanes.following[lane]
    if lanes.first == WHEEL_NONE:
        lanes.last = WHEEL_NONE
    if lanes.lanes[lane].head != WHEEL_NONE:
        lanes_append(lanes, lane)
    return slot
