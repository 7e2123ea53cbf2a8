# Implementation, inlined into _fastpath: what slows a connection down or breaks it on purpose: limits of bandwidth, injected faults.
#
# A connection that has neither owns nothing of this. A fault is decided once, after the route; a connection has one at most.

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from l4mesh._native.bandwidth cimport lane_allow, lane_end, lane_is_limited, lane_settle, lane_t, lane_waits
from l4mesh._native.route cimport prefixes_hold
from l4mesh._native.types cimport (
    FAULT_DELAY, FAULT_STALL, conn_t, fault_rule_t, fault_t, plan_t, shaping_t, span_t, worker_t,
)

cdef enum:
    LOOK_AGAIN_MS = 1000          # a half that waits for longer looks whether the rate has changed


cdef inline const fault_t *fault_choose(
    const plan_t *plan, span_t of_route, span_t of_cluster, const uint8_t *source, uint64_t random
) noexcept nogil:
    # The shares of the rules that are for this source lie side by side; NULL: the ticket is behind them.
    cdef const fault_rule_t *rule
    cdef uint64_t ticket = random >> 32
    cdef uint64_t up_to = 0
    cdef span_t span = of_route
    cdef uint32_t i
    cdef int _list
    for _list in range(2):
        for i in range(span.start, span.end):
            rule = &plan.faults[i]
            if rule.sources.start == rule.sources.end or prefixes_hold(plan, rule.sources.start, rule.sources.end, source):
                up_to += rule.share
                if ticket < up_to:
                    return &rule.fault
        span = of_cluster
    return NULL


cdef inline uint64_t fault_time_ms(const fault_t *fault, uint64_t random) noexcept nogil:
    # Anywhere in its range.
    return fault.from_ms + random % (fault.to_ms - fault.from_ms + 1)


cdef inline shaping_t *shaping_open(conn_t *conn) noexcept nogil:
    # That of the connection, made when there is none; NULL: no memory.
    if conn.shaping == NULL:
        conn.shaping = <shaping_t *> calloc(1, sizeof(shaping_t))
    return conn.shaping


cdef inline void shaping_free(conn_t *conn) noexcept nogil:
    lane_end(&conn.shaping.lanes[0])
    lane_end(&conn.shaping.lanes[1])
    free(conn.shaping)
    conn.shaping = NULL


cdef inline bint conn_is_faulted(const conn_t *conn) noexcept nogil:
    # Whatever its endpoint does after a fault is no fault of the endpoint's. A delay is over when the endpoint is dialled.
    return conn.shaping != NULL and conn.shaping.injected and conn.shaping.fault.kind != FAULT_DELAY


cdef inline bint shaping_counts(const conn_t *conn, int h) noexcept nogil:
    # Whether a fault is still to come after so many bytes of this half.
    cdef const shaping_t *shaping = conn.shaping
    return shaping.fault.bytes != 0 and shaping.fault.half == h and not shaping.injected


cdef inline bint shaping_is_due(const conn_t *conn, int h) noexcept nogil:
    # Those bytes have passed.
    return shaping_counts(conn, h) and conn.phase.half[h].bytes >= conn.shaping.fault.bytes


cdef inline bint shaping_stalls(const shaping_t *shaping, uint64_t now_ms) noexcept nogil:
    return shaping.fault.kind == FAULT_STALL and shaping.until_ms > now_ms


cdef inline uint32_t shaping_allow(worker_t *worker, conn_t *conn, int h, uint32_t most) noexcept nogil:
    # How many bytes, `most` or fewer, the half may read now. Must hold: it keeps none.
    cdef shaping_t *shaping = conn.shaping
    cdef lane_t *lane = &shaping.lanes[h]
    cdef uint64_t left
    cdef bint waits
    if shaping_stalls(shaping, worker.now_ms) or shaping_is_due(conn, h):
        return 0
    if shaping_counts(conn, h):
        left = shaping.fault.bytes - conn.phase.half[h].bytes
        most = <uint32_t> left if left < most else most
    if lane_is_limited(lane):
        waits = lane.left > 0
        left = lane_allow(lane, worker.now_ns)
        worker.throttles += left == 0 and not waits
        most = <uint32_t> left if left < most else most
    return most


cdef inline void shaping_spend(conn_t *conn, int h, uint32_t bytes) noexcept nogil:
    if lane_is_limited(&conn.shaping.lanes[h]):
        conn.shaping.lanes[h].left -= <int32_t> bytes


cdef inline void shaping_settle(worker_t *worker, conn_t *conn, int h) noexcept nogil:
    if lane_is_limited(&conn.shaping.lanes[h]):
        lane_settle(&conn.shaping.lanes[h], worker.now_ns)


cdef inline bint shaping_waits(const worker_t *worker, const conn_t *conn) noexcept nogil:
    # A half has bytes to move and waits for its bandwidth: the connection is not idle.
    return lane_waits(&conn.shaping.lanes[0], worker.now_ns) or lane_waits(&conn.shaping.lanes[1], worker.now_ns)


cdef inline uint64_t shaping_next_ms(const worker_t *worker, const conn_t *conn) noexcept nogil:
    # When the relay has to look again on its account; 0: never.
    cdef const shaping_t *shaping = conn.shaping
    cdef uint64_t at = shaping.until_ms if shaping.until_ms > worker.now_ms else 0
    cdef uint64_t wait
    cdef int h
    for h in range(2):
        if lane_waits(&shaping.lanes[h], worker.now_ns):
            wait = shaping.lanes[h].at_ns // 1000000 + 1
            if wait > worker.now_ms + LOOK_AGAIN_MS:
                wait = worker.now_ms + LOOK_AGAIN_MS
            if at == 0 or wait < at:
                at = wait
    return at
