# Implementation, inlined into _fastpath: a relaying connection as another process takes it over.
#
# Both sockets go, and a pipe that has bytes in it goes as it is: nothing is read, so that nothing is lost when the other process
# ends before it has them. What a process finds out for itself stays: epoll, timers, and what its sockets are ready for.

from libc.stdint cimport uint32_t
from libc.string cimport memset

from l4mesh._native.types cimport (
    CARRIED_FDS, CONN_ARRIVING, carried_t, conn_t, half_t, passage_t, worker_t,
)


cdef inline void passage_pack(passage_t *passage, const conn_t *conn, uint32_t slot) noexcept nogil:
    cdef carried_t *state = &passage.state
    cdef const half_t *half
    cdef int h
    memset(passage, 0, sizeof(passage_t))
    for h in range(CARRIED_FDS):
        passage.fds[h] = -1
    state.accepted_ns = conn.accepted_ns
    state.active_ms = conn.active_ms
    state.ends_at_ms = conn.ends_at_ms
    state.end_reason = conn.end_reason
    state.leaves_at_ms = conn.leaves_at_ms
    state.leave_reason = conn.leave_reason
    state.connected_us = conn.connected_us
    state.first_byte_us = conn.first_byte_us
    state.idle_ms = conn.idle_ms
    state.half_closed_ms = conn.half_closed_ms
    state.user_timeout_ms = conn.user_timeout_ms
    state.keepalive_idle_s = conn.keepalive_idle_s
    state.keepalive_interval_s = conn.keepalive_interval_s
    state.keepalive_count = conn.keepalive_count
    state.attempts = conn.attempts
    state.queued_ms = conn.queued_ms
    state.listener_flags = conn.listener_flags
    state.first_end = conn.first_end
    state.proxy_protocol = conn.proxy_protocol
    state.source = conn.source
    state.destination = conn.destination
    state.endpoint = conn.endpoint
    for h in range(2):
        half = &conn.phase.half[h]
        state.half[h].bytes = half.bytes
        state.half[h].flags = half.flags
        state.half[h].full_reads = half.full_reads
        state.half[h].small_fills = half.small_fills
        state.half[h].large_steps = half.large_steps
        state.half[h].side_flags = conn.side[h].flags
        passage.fds[h] = conn.side[h].fd
        if half.parked_length:
            state.half[h].parked_length = half.parked_length
            passage.parked[h] = half.parked + half.parked_offset
        if half.piped:
            state.half[h].piped = half.piped
            passage.fds[2 + 2 * h] = half.pipe.read_fd
            passage.fds[3 + 2 * h] = half.pipe.write_fd
    passage.listener_stat = conn.listener_stat
    passage.cluster_stat = conn.cluster_stat
    passage.endpoint_stat = conn.endpoint_stat
    passage.slot = slot


cdef inline void passage_unpack(worker_t *worker, passage_t *passage, conn_t *conn, uint32_t slot) noexcept nogil:
    # Into a connection of this process, which owns what the passage had from now on.
    cdef const carried_t *state = &passage.state
    cdef half_t *half
    cdef int h
    conn.state = CONN_ARRIVING
    conn.accepted_ns = state.accepted_ns
    conn.active_ms = state.active_ms
    conn.ends_at_ms = state.ends_at_ms
    conn.end_reason = state.end_reason
    conn.leaves_at_ms = state.leaves_at_ms
    conn.leave_reason = state.leave_reason
    conn.connected_us = state.connected_us
    conn.first_byte_us = state.first_byte_us
    conn.idle_ms = state.idle_ms
    conn.half_closed_ms = state.half_closed_ms
    conn.user_timeout_ms = state.user_timeout_ms
    conn.keepalive_idle_s = state.keepalive_idle_s
    conn.keepalive_interval_s = state.keepalive_interval_s
    conn.keepalive_count = state.keepalive_count
    conn.attempts = state.attempts
    conn.queued_ms = state.queued_ms
    conn.listener_flags = state.listener_flags
    conn.first_end = state.first_end
    conn.proxy_protocol = state.proxy_protocol
    conn.source = state.source
    conn.destination = state.destination
    conn.endpoint = state.endpoint
    conn.listener_stat = passage.listener_stat
    conn.cluster_stat = passage.cluster_stat
    conn.endpoint_stat = passage.endpoint_stat
    for h in range(2):
        half = &conn.phase.half[h]
        half.bytes = state.half[h].bytes
        half.flags = state.half[h].flags
        half.full_reads = state.half[h].full_reads
        half.small_fills = state.half[h].small_fills
        half.large_steps = state.half[h].large_steps
        half.parked = passage.parked[h]
        half.parked_length = state.half[h].parked_length
        half.piped = state.half[h].piped
        half.pipe.read_fd = passage.fds[2 + 2 * h]
        half.pipe.write_fd = passage.fds[3 + 2 * h]
        worker.pipes += half.piped != 0
        passage.parked[h] = NULL
        conn.side[h].fd = passage.fds[h]
        conn.side[h].flags = state.half[h].side_flags
    passage.slot = slot
