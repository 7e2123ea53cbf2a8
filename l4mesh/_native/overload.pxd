# Implementation, inlined into _fastpath: what a worker does while the process is short of something. What and how much is for
# runtime/overload.py to decide; with nothing decided each question costs a load and a branch.

from libc.stdint cimport int64_t, uint32_t, uint64_t

from l4mesh._native.atomic cimport load
from l4mesh._native.sources cimport source_lock, source_take, source_unlock
from l4mesh._native.types cimport QUEUED_EVENT, SHED_ACCEPTS, SHED_IDLE, conn_t, source_t, sources_t, worker_t
from l4mesh._native.wheel cimport l4_clz64

cdef enum:
    SHARE_BUCKETS = 512


cdef inline bint overload_pauses(worker_t *worker) noexcept nogil:
    # Whether the worker has accepted as many as it may before its next pause.
    cdef int64_t budget = load(&worker.engine.accept_budget)
    if budget == 0 or worker.accept_spent < <uint64_t> budget:
        return False
    worker.shed[<int> SHED_ACCEPTS] += 1
    return True


cdef inline void overload_count(worker_t *worker, conn_t *conn) noexcept nogil:
    # Counts a live connection to its source's, where it was made before anybody did.
    if conn.source_count == NULL and (worker.plan.max_connections_per_source or load(&worker.engine.source_share)):
        source_take(worker.engine.sources, &conn.source, <int64_t> 1 << 62, &conn.source_count)


cdef inline bint overload_ends(worker_t *worker, conn_t *conn) noexcept nogil:
    # Asked by a sweep about a live connection: has it been idle for longer than is good now? One whose idle timeout is off has
    # none that could be shortened.
    cdef int64_t cap_ms = load(&worker.engine.idle_cap_ms)
    if cap_ms == 0 or conn.idle_ms == 0 or conn.queued == QUEUED_EVENT or worker.now_ms - conn.active_ms < <uint64_t> cap_ms:
        return False
    worker.shed[<int> SHED_IDLE] += 1
    return True


cdef inline bint overload_source_limit(worker_t *worker, int64_t *limit) noexcept nogil:
    # Lowers the limit by source (0: none) to what a source may have now. True: it is lower than what is configured.
    cdef int64_t share = load(&worker.engine.source_share)
    if share == 0 or (limit[0] and limit[0] <= share):
        return False
    limit[0] = share
    return True


cdef inline uint32_t share_bucket(uint64_t count) noexcept nogil:
    # Exact up to 16, then sixteen to each doubling (as HDR histograms have it).
    cdef int top
    if count < 16:
        return <uint32_t> count
    top = 63 - l4_clz64(count)
    if top > 34:
        return SHARE_BUCKETS - 1
    return <uint32_t> (16 * (top - 3)) + (<uint32_t> (count >> (top - 4)) & 15)


cdef inline uint64_t share_least(uint32_t bucket) noexcept nogil:
    # The least count that falls into a bucket.
    if bucket < 16:
        return bucket
    return <uint64_t> (16 + bucket % 16) << (bucket // 16 - 1)


cdef inline void sources_measure(sources_t *table, uint64_t *sources) noexcept nogil:
    # How many sources have how many live connections: adds to `sources`, by share_bucket.
    cdef const source_t *source
    cdef int64_t *lock
    cdef uint32_t at
    for at in range(65536):
        if table.heads[at] == NULL:
            continue
        lock = &table.locks[at & 255]
        source_lock(lock)
        source = table.heads[at]
        while source != NULL:
            sources[share_bucket(<uint64_t> source.active)] += 1
            source = source.next
        source_unlock(lock)
