# Implementation, inlined into _fastpath: counters that outlive plans.
#
# Owner: the engine, which frees a block when no plan names it and its `active` is 0. A connection that is counted in `active`
# may hold a pointer to the block.

from libc.stdint cimport int64_t, uint64_t

cdef enum:
    CLOSE_REASONS = 26
    CONNECT_BUCKETS = 17

ctypedef struct endpoint_stat_t:
    # Written by all workers with relaxed atomics, once or twice a connection. `active` must be shared for least_connections to be
    # right across workers; the others ride on the same cache line.
    int64_t active
    uint64_t opened
    uint64_t connect_failures
    uint64_t bytes_to_upstream
    uint64_t bytes_to_downstream
    uint64_t id
    uint64_t pad[2]
