# Implementation, inlined into _fastpath: whose turn it is when more is wanted than can be served.
#
# The kernel's queue of connections is one for all sources, first in first out, and so is that of events: behind a source that opens
# hundreds of connections everybody else waits. So of a deep queue and of many events at once few are served at once; the rest is put
# aside in lanes by source, and while a source has a lane everything of it goes there. Lanes are served in turn, few in a turn of the
# worker (stochastic fairness queueing, McKenney, INFOCOM 1990; one connection is the quantum, so that no deficit need be kept), and
# those that have none are served at once. While queues are shallow nothing is put aside.
#
# Within a lane those under way go before those that have only been accepted: what is begun is finished first, so that a source never
# has more under way than answers come for, and its endpoints, which know nothing of turns, have no long queues either. Steps of
# handshakes have lanes of their own, since one of them takes as long as a whole turn otherwise does.

from libc.stdint cimport uint8_t, uint32_t

from l4mesh._native.queue cimport queue_push, queue_remove, source_lane
from l4mesh._native.slab cimport conn_at
from l4mesh._native.types cimport LANES, QUEUED_HEAVY, conn_t, lanes_t, worker_t
from l4mesh._native.wheel cimport WHEEL_NONE

cdef enum:
    LANE_DIRECT = 4              # accepted at one event that are served at once
    LANE_EVENTS = 32             # at once that are served at once
    LANE_TURN = 4                # served from lanes in a turn of the worker
    LANE_IN_A_ROW = 8            # begun ones of a lane before one that was accepted: those of its source wait, but not for ever
    LANES_FULL = 4096            # in lanes; the rest stays with the kernel
    LANE_IDLE = 0xfffffffe       # in the place of the lane that follows: has no turn


cdef inline void lanes_init(lanes_t *lanes) noexcept nogil:
    cdef uint32_t i
    lanes.first = lanes.last = WHEEL_NONE
    for i in range(LANES):
        lanes.accepted[i].head = lanes.accepted[i].tail = WHEEL_NONE
        lanes.begun[i].head = lanes.begun[i].tail = WHEEL_NONE
        lanes.following[i] = LANE_IDLE


cdef inline void lanes_append(lanes_t *lanes, uint32_t lane) noexcept nogil:
    lanes.following[lane] = WHEEL_NONE
    if lanes.last == WHEEL_NONE:
        lanes.first = lane
    else:
        lanes.following[lanes.last] = lane
    lanes.last = lane


cdef inline bint lane_is_empty(const lanes_t *lanes, uint32_t lane) noexcept nogil:
    return lanes.accepted[lane].head == WHEEL_NONE and lanes.begun[lane].head == WHEEL_NONE


cdef inline bint lane_is_in_use(const worker_t *worker, const conn_t *conn) noexcept nogil:
    # Whether something of the connection's source waits.
    return worker.lanes.n and not lane_is_empty(&worker.lanes, source_lane(worker, conn))


cdef inline void lanes_push(worker_t *worker, conn_t *conn, uint32_t slot, uint8_t which) noexcept nogil:
    # To the end of the list QUEUED_`which` in its source's lane, unless it is in a list already.
    cdef lanes_t *lanes = &worker.heavy if which == QUEUED_HEAVY else &worker.lanes
    cdef uint32_t lane
    if conn.queued:
        return
    lane = source_lane(worker, conn)
    if lanes.following[lane] == LANE_IDLE:
        lanes_append(lanes, lane)
    queue_push(worker, conn, slot, which)
    lanes.n += 1


cdef inline uint32_t lanes_pop(worker_t *worker, lanes_t *lanes) noexcept nogil:
    # The next connection, out of its lane; WHEEL_NONE: there is none.
    cdef uint32_t lane, slot
    while lanes.first != WHEEL_NONE:
        lane = lanes.first
        lanes.first = lanes.following[lane]
        if lanes.first == WHEEL_NONE:
            lanes.last = WHEEL_NONE
        lanes.following[lane] = LANE_IDLE
        slot = lanes.accepted[lane].head
        if lanes.begun[lane].head != WHEEL_NONE and (slot == WHEEL_NONE or lanes.in_a_row[lane] < LANE_IN_A_ROW):
            slot = lanes.begun[lane].head
            lanes.in_a_row[lane] = min(lanes.in_a_row[lane] + 1, LANE_IN_A_ROW)
        else:
            lanes.in_a_row[lane] = 0
        if slot == WHEEL_NONE:
            # Those in it have ended meanwhile.
            continue
        queue_remove(worker, conn_at(worker, slot))
        if not lane_is_empty(lanes, lane):
            lanes_append(lanes, lane)
        return slot
    return WHEEL_NONE
