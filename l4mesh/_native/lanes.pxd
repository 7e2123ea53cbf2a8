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

from l4mesh._native.queue cimport conn_lane, conn_source, queue_push, queue_remove
from l4mesh._native.slab cimport conn_at
from l4mesh._native.types cimport LANES, QUEUED_HEAVY, conn_t, lanes_t, turns_t, worker_t
from l4mesh._native.wheel cimport WHEEL_NONE

cdef enum:
    LANE_DIRECT = 4              # accepted at one event that are served at once
    LANE_EVENTS = 32             # at once that are served at once
    LANE_TURN = 4                # served from lanes in a turn of the worker
    LANE_IN_A_ROW = 8            # begun ones of a lane before one that was accepted: those of its source wait, but not for ever
    LANES_FULL = 4096            # in lanes; the rest stays with the kernel
    LANE_IDLE = 0xfffffffe       # in the place of what follows: has no turn


cdef inline void lanes_init(lanes_t *lanes) noexcept nogil:
    cdef uint32_t i
    lanes.sources.first = lanes.sources.last = WHEEL_NONE
    for i in range(LANES):
        lanes.accepted[i].head = lanes.accepted[i].tail = WHEEL_NONE
        lanes.begun[i].head = lanes.begun[i].tail = WHEEL_NONE
        lanes.of[i].first = lanes.of[i].last = WHEEL_NONE
        lanes.following[i] = lanes.following_source[i] = LANE_IDLE


cdef inline void turns_append(turns_t *turns, uint32_t *following, uint32_t which) noexcept nogil:
    # Unless it is there already.
    if following[which] != LANE_IDLE:
        return
    following[which] = WHEEL_NONE
    if turns.last == WHEEL_NONE:
        turns.first = which
    else:
        following[turns.last] = which
    turns.last = which


cdef inline uint32_t turns_pop(turns_t *turns, uint32_t *following) noexcept nogil:
    cdef uint32_t which = turns.first
    turns.first = following[which]
    if turns.first == WHEEL_NONE:
        turns.last = WHEEL_NONE
    following[which] = LANE_IDLE
    return which


cdef inline bint lane_is_empty(const lanes_t *lanes, uint32_t lane) noexcept nogil:
    return lanes.accepted[lane].head == WHEEL_NONE and lanes.begun[lane].head == WHEEL_NONE


cdef inline bint lane_is_in_use(const worker_t *worker, const conn_t *conn) noexcept nogil:
    # Whether something waits that the connection may not overtake.
    return worker.lanes.n and not lane_is_empty(&worker.lanes, conn_lane(worker, conn))


cdef inline void lanes_push(worker_t *worker, conn_t *conn, uint32_t slot, uint8_t which) noexcept nogil:
    # To the end of the list QUEUED_`which` in its lane, unless it is in a list already.
    cdef lanes_t *lanes = &worker.heavy if which == QUEUED_HEAVY else &worker.lanes
    cdef uint32_t source, lane
    if conn.queued:
        return
    source = conn_source(worker, conn)
    lane = conn_lane(worker, conn)
    if lanes.following[lane] == LANE_IDLE:
        # A lane that two sources share by chance has the turns of the one that came first.
        turns_append(&lanes.of[source], lanes.following, lane)
        turns_append(&lanes.sources, lanes.following_source, source)
    queue_push(worker, conn, slot, which)
    lanes.n += 1


cdef inline uint32_t lane_next(lanes_t *lanes, uint32_t lane) noexcept nogil:
    # WHEEL_NONE: those in it have ended meanwhile.
    cdef uint32_t slot = lanes.accepted[lane].head
    if lanes.begun[lane].head != WHEEL_NONE and (slot == WHEEL_NONE or lanes.in_a_row[lane] < LANE_IN_A_ROW):
        lanes.in_a_row[lane] = min(lanes.in_a_row[lane] + 1, LANE_IN_A_ROW)
        return lanes.begun[lane].head
    lanes.in_a_row[lane] = 0
    return slot


cdef inline uint32_t lanes_pop(worker_t *worker, lanes_t *lanes) noexcept nogil:
    # The next connection, out of its lane; WHEEL_NONE: there is none.
    cdef uint32_t source, lane, slot = WHEEL_NONE
    while slot == WHEEL_NONE and lanes.sources.first != WHEEL_NONE:
        source = turns_pop(&lanes.sources, lanes.following_source)
        lane = turns_pop(&lanes.of[source], lanes.following)
        slot = lane_next(lanes, lane)
        if slot != WHEEL_NONE:
            queue_remove(worker, conn_at(worker, slot))
        if not lane_is_empty(lanes, lane):
            turns_append(&lanes.of[source], lanes.following, lane)
        if lanes.of[source].first != WHEEL_NONE:
            turns_append(&lanes.sources, lanes.following_source, source)
    return slot
