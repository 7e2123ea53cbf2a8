# Implementation, inlined into _fastpath: counters that outlive plans.
#
# Owner: the engine, which frees a block when no plan names it and its `active` is 0. A connection that is counted in `active`
# may hold a pointer to the block.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    CLOSE_REASONS = 40
    CONNECT_BUCKETS = 17
    NAME_BYTES = 32
    FAULT_KINDS = 7          # "none" included

cdef enum:
    # What an endpoint can do wrong: indexes of endpoint_stat_t.failures, and bits of outlier_t.signals
    SIGNAL_CONNECT = 0       # refused, unreachable, no answer within the connect timeout
    SIGNAL_TLS = 1
    SIGNAL_EARLY_RESET = 2
    SIGNAL_NO_ANSWER = 3
    SIGNAL_TLS_LATE = 4      # a refusal after our handshake was over; SIGNAL_TLS watches for it as well
    SIGNALS = 5

ctypedef struct endpoint_stat_t:
    # Written by all workers with relaxed atomics, once or twice a connection. `active` must be shared for least_connections to be
    # right across workers; the others ride on the same cache line.
    int64_t active
    uint64_t opened
    uint64_t connect_failures
    uint64_t bytes_to_upstream
    uint64_t bytes_to_downstream
    uint64_t id
    # Written by the control loop.
    int64_t out              # why it takes no connections, a bit each; 0: it does
    uint32_t leave_over_ms   # its connections leave over this time
    uint16_t leave_permille  # how many of them; 1000 are all, and those that come later as well
    uint8_t leave_reason     # close_reason_t; 0: they stay
    uint8_t failing          # its last dial failed; written by workers
    uint64_t leave_sweep     # of some of them: the sweep that picks them
    uint64_t warm_from_ms    # slow start: its weight grows from here
    uint64_t warm_until_ms   # to here; 0: it has its weight
    # From here on: of clusters with outlier detection, and all but the first written only when something is wrong.
    uint64_t connect_ns              # of the dials that succeeded
    uint64_t failures[SIGNALS]
    uint64_t failed_connects         # in a row
    uint64_t failed_answers          # in a row, of connections that were made
    int64_t told                     # 1: on the engine's list, or about to be
    endpoint_stat_t *told_next
    uint64_t pad1[3]

ctypedef struct outlier_t:
    # What workers watch for. Written by the control loop, at any time.
    uint64_t signals                 # bit set of SIGNAL_*; 0: off
    uint64_t consecutive             # failures in a row of which the control loop is told at once; 0: of none
    uint64_t early_reset_ms
    uint64_t no_answer_ms

ctypedef struct cluster_row_t:
    # One worker's counts of one cluster; that worker alone writes.
    uint64_t opened
    uint64_t closed[CLOSE_REASONS]
    uint64_t bytes_to_upstream
    uint64_t bytes_to_downstream
    uint64_t connect_attempts
    uint64_t connect_failures
    uint64_t connect_ns
    uint64_t connect_buckets[CONNECT_BUCKETS]
    uint64_t cursor      # round robin's place; outlives reloads, starts at random
    uint64_t faults[FAULT_KINDS]
    int64_t waiting      # connections in this worker's line; read by all
    int64_t offered      # 1: the worker has been told of a free place and has not looked yet; written by all
    void *line           # waiting_t; NULL: nobody waits here
    uint64_t queued      # connections that have waited, and for how long
    uint64_t queued_ns
    uint64_t retries_refused     # by the budget

ctypedef struct cluster_stat_t:
    int64_t active       # of all workers: the cluster's limit counts on it
    int64_t panic        # written by the control loop: too few endpoints are left, and all of them serve
    uint64_t id
    cluster_row_t *rows  # one a worker, in the same block
    int64_t waiting      # connections that wait for a place, of all workers
    int64_t retrying     # connections whose first attempt has failed and that dial on
    uint64_t turn        # whose line the next free place is offered to
    char name[NAME_BYTES]            # for the watchdog, as much of it as there is room for
    outlier_t outlier

ctypedef struct listener_row_t:
    uint64_t opened
    uint64_t closed[CLOSE_REASONS]

ctypedef struct listener_stat_t:
    int64_t active
    uint64_t id
    listener_row_t *rows
    uint64_t arrival_ns  # of its rate, as arrival_t
    char name[NAME_BYTES]


cdef inline int connect_bucket(uint64_t ns) noexcept nogil:
    # Index of the connect-time bucket; the bounds are `snapshot.CONNECT_BUCKETS_S`, and a test compares them.
    cdef uint64_t us = ns // 1000
    if us <= 5000:
        if us <= 100: return 0
        if us <= 250: return 1
        if us <= 500: return 2
        if us <= 1000: return 3
        if us <= 2500: return 4
        return 5
    if us <= 10000: return 6
    if us <= 25000: return 7
    if us <= 50000: return 8
    if us <= 100000: return 9
    if us <= 250000: return 10
    if us <= 500000: return 11
    if us <= 1000000: return 12
    if us <= 2500000: return 13
    if us <= 5000000: return 14
    if us <= 10000000: return 15
    return 16
