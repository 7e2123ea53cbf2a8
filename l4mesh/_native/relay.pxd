# Implementation, inlined into _fastpath: one half of a connection, from one side to the other.
#
# Copy: recv into the worker's scratch buffer, send from it; only what the destination did not take is kept (parked). Splice: fill
# an empty pipe, empty it into the destination. A half is promoted after two full reads in a row and demoted when the stream
# becomes a conversation. After HAProxy's raw_sock.c and ztunnel's copy.rs; unlike both, a half that waits for its source owns
# no buffer and no pipe, and splice is on by default.
#
# The two meanings of EAGAIN from splice(2), "socket empty" and "pipe full", are kept apart by never filling a pipe that has
# bytes in it: then it can only be the socket. That is also why a short fill proves nothing. Nor does 0, which is the end or an urgent
# mark before it: splice never gets past one, and recv, which does, tells.
#
# Where TLS is on either side the copy path reads and writes through it (tls.pxd) and moves up to PLAIN_BYTES at a time; then what
# the destination did not take is kept as the bytes of its wire, ciphertext included.

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from l4mesh._native.linux cimport (
    EAGAIN, EINTR, EINVAL, F_SETPIPE_SZ, IPPROTO_TCP, MSG_NOSIGNAL, O_CLOEXEC, O_NONBLOCK, SOL_SOCKET, SO_MEMINFO,
    SO_RCVLOWAT, SPLICE_F_MOVE, SPLICE_F_NONBLOCK, TCP_NODELAY, close, errno, fcntl, getsockopt, is_shortage, pipe2, recv, send, setsockopt,
    socklen_t, splice,
)
from l4mesh._native.shaping cimport shaping_allow, shaping_settle, shaping_spend
from l4mesh._native.outlier cimport outlier_answered
from l4mesh._native.stats cimport cluster_row_t
from l4mesh._native.tls cimport tls_flush, tls_read, tls_shut, tls_write
from l4mesh._native.types cimport (
    FLOW_BLOCKED, FLOW_DESTINATION_RESET, FLOW_END, FLOW_EXHAUSTED, FLOW_MORE, FLOW_SOURCE_RESET, HALF_DROPPED, HALF_ENDED, HALF_HEADER,
    HALF_PACED, HALF_SPLICE, HALF_WAITS, PIPE_POOL, PLAIN_BYTES, SCRATCH_BYTES, SIDE_ERROR, SIDE_FIN_SEEN, SIDE_NODELAY,
    SIDE_PENDING, SIDE_READABLE, SIDE_RESET, SIDE_URGENT, SIDE_WRITABLE, TLS_READ_BYTES, TLS_SHUT, TLS_STEP_BYTES, UPSTREAM,
    conn_t, flow_t, half_t, pipe_t, side_t, worker_t,
)

cdef enum:
    PIPE_BYTES = 524288           # asked for; the kernel may give less (fs.pipe-user-pages-soft), which only costs calls
    BUDGET_BYTES = 1048576        # a half moves about this much before the next connection has its turn
    PROMOTE_READS = 2
    DEMOTE_FILLS = 8
    SMALL_FILL = 16384            # splicing less than this costs more than copying it
    PACE_BYTES = 524288           # of a stream that the kernel gathers before it wakes us
    PACE_NS = 200000              # and how long less than that is left lying
    PACE_LARGE = 32768            # a step of a stream; less is the end of a burst, or a conversation
    PACE_AFTER = 8                # such steps in a row
    NAGLE_SAFE = 536              # smallest MSS: one segment, sent at once while nothing is in flight


cdef inline bint pipe_take(worker_t *worker, pipe_t *taken) noexcept nogil:
    # An empty pipe from the pool or a new one; false when there is no descriptor for it.
    cdef int fds[2]
    if worker.n_pool:
        worker.n_pool -= 1
        taken[0] = worker.pool[worker.n_pool]
        return True
    if pipe2(fds, O_NONBLOCK | O_CLOEXEC) != 0:
        return False
    fcntl(fds[1], F_SETPIPE_SZ, <int> PIPE_BYTES)
    taken.read_fd = fds[0]
    taken.write_fd = fds[1]
    worker.pipes += 1
    return True


cdef inline void pipe_close(worker_t *worker, pipe_t *pipe) noexcept nogil:
    close(pipe.read_fd)
    close(pipe.write_fd)
    worker.pipes -= 1


cdef inline void half_release_pipe(worker_t *worker, half_t *half) noexcept nogil:
    # Back to the pool, but never with bytes in it: they would come out in another connection.
    if half.pipe.read_fd < 0:
        return
    if half.piped == 0 and worker.n_pool < PIPE_POOL:
        worker.pool[worker.n_pool] = half.pipe
        worker.n_pool += 1
    else:
        pipe_close(worker, &half.pipe)
    half.pipe.read_fd = -1
    half.piped = 0


cdef inline void half_drop(worker_t *worker, half_t *half) noexcept nogil:
    # Gives up what the half holds: its destination is gone.
    free(half.parked)
    half.parked = NULL
    half.parked_length = 0
    half_release_pipe(worker, half)
    half.flags |= HALF_DROPPED


cdef inline uint32_t clamp_us(uint64_t ns) noexcept nogil:
    # In 32 bits, which hold 71 minutes: what took longer took so long at least.
    return <uint32_t> -1 if ns // 1000 > <uint32_t> -1 else <uint32_t> (ns // 1000)


cdef inline void half_count(worker_t *worker, conn_t *conn, int h, ssize_t n) noexcept nogil:
    # Counted when the destination's socket has taken them.
    cdef half_t *half = &conn.phase.half[h]
    cdef cluster_row_t *row = &conn.cluster_stat.rows[worker.index]
    if h == UPSTREAM:
        if half.bytes == 0:
            conn.first_byte_us = clamp_us(worker.now_ns - conn.accepted_ns)
            outlier_answered(conn)
        row.bytes_to_downstream += <size_t> n
    else:
        row.bytes_to_upstream += <size_t> n
    half.bytes += <size_t> n
    conn.active_ms = worker.now_ms


cdef inline flow_t send_failed(conn_t *conn, side_t *sink, half_t *half) noexcept nogil:
    # What a failed send or splice to the destination means; reads errno.
    if errno == EAGAIN:
        sink.flags &= ~<uint32_t> SIDE_WRITABLE
        return FLOW_BLOCKED
    if is_shortage(errno):
        return FLOW_EXHAUSTED
    conn.errno_seen = errno
    sink.flags |= SIDE_RESET | SIDE_READABLE
    half.flags |= HALF_DROPPED
    return FLOW_DESTINATION_RESET


cdef inline flow_t half_flush_parked(worker_t *worker, conn_t *conn, int h) noexcept nogil:
    # FLOW_MORE when nothing is parked any more.
    cdef half_t *half = &conn.phase.half[h]
    cdef side_t *sink = &conn.side[1 - h]
    cdef ssize_t n
    while half.parked_length:
        if not sink.flags & SIDE_WRITABLE:
            return FLOW_BLOCKED
        n = send(sink.fd, half.parked + half.parked_offset, half.parked_length, MSG_NOSIGNAL)
        if n < 0:
            if errno == EINTR:
                continue
            return send_failed(conn, sink, half)
        if not half.flags & HALF_HEADER:
            half_count(worker, conn, h, n)
        worker.bytes_copied += <size_t> n
        half.parked_offset += <uint32_t> n
        half.parked_length -= <uint32_t> n
        if half.parked_length:
            sink.flags &= ~<uint32_t> SIDE_WRITABLE
    free(half.parked)
    half.parked = NULL
    half.flags &= ~<uint8_t> HALF_HEADER
    return FLOW_MORE


cdef inline flow_t half_flush_pipe(worker_t *worker, conn_t *conn, int h) noexcept nogil:
    # FLOW_MORE when the pipe is empty.
    cdef half_t *half = &conn.phase.half[h]
    cdef side_t *sink = &conn.side[1 - h]
    cdef ssize_t n
    while half.piped:
        if not sink.flags & SIDE_WRITABLE:
            return FLOW_BLOCKED
        n = splice(half.pipe.read_fd, NULL, sink.fd, NULL, half.piped, SPLICE_F_MOVE | SPLICE_F_NONBLOCK)
        if n <= 0:
            if n < 0 and errno == EINTR:
                continue
            return send_failed(conn, sink, half) if n < 0 else FLOW_EXHAUSTED
        half_count(worker, conn, h, n)
        worker.bytes_spliced += <size_t> n
        half.piped -= <uint32_t> n
    return FLOW_MORE


cdef inline flow_t source_failed(conn_t *conn, side_t *source) noexcept nogil:
    # What a failed recv or splice from the source means; reads errno. Linux hands out what was queued before the error.
    if errno == EAGAIN:
        source.flags &= ~<uint32_t> SIDE_READABLE
        return FLOW_BLOCKED
    if errno == EINTR:
        return FLOW_MORE
    if is_shortage(errno):
        return FLOW_EXHAUSTED
    conn.errno_seen = errno
    source.flags |= SIDE_RESET
    return FLOW_SOURCE_RESET


cdef inline flow_t half_end(half_t *half, const side_t *source) noexcept nogil:
    # A reset that was noticed while sending leaves an end-of-file behind what was queued.
    if source.flags & SIDE_RESET:
        return FLOW_SOURCE_RESET
    half.flags |= HALF_ENDED
    return FLOW_MORE


cdef inline bint half_park(half_t *half, const uint8_t *data, size_t length) noexcept nogil:
    half.parked = <uint8_t *> malloc(length)
    if half.parked == NULL:
        return False
    memcpy(half.parked, data, length)
    half.parked_offset = 0
    half.parked_length = <uint32_t> length
    return True


cdef inline void side_set_nodelay(side_t *side) noexcept nogil:
    cdef int one = 1
    if not side.flags & SIDE_NODELAY:
        setsockopt(side.fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one))
        side.flags |= SIDE_NODELAY


cdef inline flow_t half_send(worker_t *worker, conn_t *conn, int h, const uint8_t *data, size_t length) noexcept nogil:
    # Sends the data and parks what the destination does not take.
    cdef half_t *half = &conn.phase.half[h]
    cdef side_t *sink = &conn.side[1 - h]
    cdef ssize_t n
    cdef flow_t flow
    # The listener's sockets inherit TCP_NODELAY. A dialled one gets it when Nagle could first hold something back: a
    # connection that sends one small request saves the call.
    if half.bytes or length > NAGLE_SAFE:
        side_set_nodelay(sink)
    n = send(sink.fd, data, length, MSG_NOSIGNAL)
    if n < 0:
        flow = send_failed(conn, sink, half)
        if flow != FLOW_BLOCKED:
            return flow
        n = 0
    else:
        half_count(worker, conn, h, n)
        worker.bytes_copied += <size_t> n
    if <size_t> n == length:
        return FLOW_MORE
    # A partial send has told the kernel that we want to know when there is room again: no second try.
    sink.flags &= ~<uint32_t> SIDE_WRITABLE
    if not half_park(half, data + n, length - <size_t> n):
        return FLOW_EXHAUSTED
    return FLOW_BLOCKED


cdef inline void side_took(side_t *source, bint short_read, half_t *half) noexcept nogil:
    # A short read empties the queue. With the FIN known to be behind it, the end is known without another call; an urgent mark
    # or an error would have cut the read short as well.
    if short_read and not source.flags & (SIDE_URGENT | SIDE_ERROR):
        if source.flags & SIDE_FIN_SEEN:
            half.flags |= HALF_ENDED
        source.flags &= ~<uint32_t> SIDE_READABLE


cdef inline flow_t half_copy(worker_t *worker, conn_t *conn, int h, uint32_t *moved, uint32_t limit) noexcept nogil:
    # One read of at most SCRATCH_BYTES.
    cdef half_t *half = &conn.phase.half[h]
    cdef side_t *source = &conn.side[h]
    cdef uint32_t most = SCRATCH_BYTES if limit > SCRATCH_BYTES else limit
    cdef ssize_t n = recv(source.fd, worker.scratch, most, 0)
    if n < 0:
        return source_failed(conn, source)
    if n == 0:
        return half_end(half, source)
    moved[0] += <uint32_t> n
    if n == SCRATCH_BYTES:
        if half.full_reads < PROMOTE_READS:
            half.full_reads += 1
        if half.full_reads == PROMOTE_READS and worker.plan.splice and not source.flags & SIDE_URGENT:
            half.flags |= HALF_SPLICE
            half.small_fills = 0
    elif <uint32_t> n < most:
        half.full_reads = 0
        side_took(source, True, half)
    return half_send(worker, conn, h, worker.scratch, <size_t> n)


cdef inline flow_t half_encrypt(worker_t *worker, conn_t *conn, int h, const uint8_t *data, size_t length) noexcept nogil:
    # As half_send, to a side with TLS. Its bytes are counted when they are handed to TLS, which keeps them.
    cdef side_t *sink = &conn.side[1 - h]
    cdef flow_t flow
    side_set_nodelay(sink)
    flow = tls_write(worker, sink, data, length, &conn.errno_seen)
    if flow == FLOW_MORE or flow == FLOW_BLOCKED:
        half_count(worker, conn, h, <ssize_t> length)
    elif flow == FLOW_DESTINATION_RESET:
        conn.phase.half[h].flags |= HALF_DROPPED
    return flow


cdef inline uint32_t side_room(const side_t *sink) noexcept nogil:
    # How much the socket would take at once: half of what is free, for the kernel's own account goes from it as well.
    cdef uint32_t memory[9]          # SK_MEMINFO_VARS
    cdef socklen_t size = sizeof(memory)
    if getsockopt(sink.fd, SOL_SOCKET, SO_MEMINFO, memory, &size) != 0 or memory[5] > memory[3]:
        return 0
    return (memory[3] - memory[5]) // 2


cdef inline uint32_t half_large(const half_t *half, const side_t *sink, uint32_t limit) noexcept nogil:
    # How much to read of a stream where TLS is on either side: what the destination would not take we would have to keep. 0: as usual.
    cdef uint32_t room
    if not half.full_reads:
        return 0
    room = side_room(sink)
    if room > limit:
        room = limit
    if room > PLAIN_BYTES:
        room = PLAIN_BYTES
    if room < TLS_STEP_BYTES + 2 * TLS_READ_BYTES:
        return 0
    return (room - TLS_STEP_BYTES) & ~<uint32_t> (TLS_READ_BYTES - 1)


cdef inline flow_t half_copy_tls(worker_t *worker, conn_t *conn, int h, uint32_t *moved, uint32_t limit) noexcept nogil:
    # One read where TLS is on either side, or on both.
    cdef half_t *half = &conn.phase.half[h]
    cdef side_t *source = &conn.side[h]
    cdef size_t length = 0
    cdef bint ended = False
    cdef uint32_t large = half_large(half, &conn.side[1 - h], limit)
    cdef size_t most = large if large else TLS_READ_BYTES
    cdef ssize_t n
    cdef flow_t flow = FLOW_MORE, sent
    if source.tls != NULL:
        flow = tls_read(worker, source, large, limit, &length, &ended, &conn.errno_seen)
        if ended:
            half.flags |= HALF_ENDED
    else:
        if limit < most:
            most = limit
        n = recv(source.fd, worker.plain, most, 0)
        if n < 0:
            return source_failed(conn, source)
        if n == 0:
            return half_end(half, source)
        length = <size_t> n
        side_took(source, length < most, half)
    half.full_reads = length >= TLS_READ_BYTES
    if length == 0:
        return flow
    moved[0] += <uint32_t> length
    if conn.side[1 - h].tls != NULL:
        sent = half_encrypt(worker, conn, h, worker.plain, length)
    else:
        sent = half_send(worker, conn, h, worker.plain, length)
    return flow if sent == FLOW_MORE else sent


cdef inline flow_t half_shut(worker_t *worker, conn_t *conn, int h) noexcept nogil:
    # The source has ended. FLOW_END when the destination may be told: over TLS close_notify goes before the FIN.
    cdef side_t *sink = &conn.side[1 - h]
    if sink.tls == NULL or sink.tls.flags & TLS_SHUT:
        return FLOW_END
    return tls_shut(worker, sink, &conn.errno_seen)


cdef inline flow_t half_splice(worker_t *worker, conn_t *conn, int h, uint32_t *moved, uint32_t limit) noexcept nogil:
    # One fill of an empty pipe, and as much of it as the destination takes.
    cdef half_t *half = &conn.phase.half[h]
    cdef side_t *source = &conn.side[h]
    cdef ssize_t n
    if source.flags & SIDE_URGENT or (half.pipe.read_fd < 0 and not pipe_take(worker, &half.pipe)):
        # splice never gets past an urgent mark.
        half.flags &= ~<uint8_t> HALF_SPLICE
        return FLOW_MORE
    if limit > PIPE_BYTES:
        limit = PIPE_BYTES
    n = splice(source.fd, NULL, half.pipe.write_fd, NULL, limit, SPLICE_F_MOVE | SPLICE_F_NONBLOCK)
    if n < 0:
        if errno == EINVAL:
            half.flags &= ~<uint8_t> HALF_SPLICE
            return FLOW_MORE
        return source_failed(conn, source)
    if n == 0:
        # The end, or a FIN behind an urgent mark that nobody has told us of yet: recv knows.
        half.flags &= ~<uint8_t> HALF_SPLICE
        return FLOW_MORE
    moved[0] += <uint32_t> n
    half.piped = <uint32_t> n
    if n < SMALL_FILL and <uint32_t> n < limit:
        half.small_fills += 1
        if half.small_fills == DEMOTE_FILLS:
            half.flags &= ~<uint8_t> HALF_SPLICE
            half.full_reads = 0
    else:
        half.small_fills = 0
    return half_flush_pipe(worker, conn, h)


cdef inline void half_set_pace(half_t *half, side_t *source, int bytes) noexcept nogil:
    # `bytes` of 1 ends the pace: then the source is looked at once more, for what came below the mark.
    half.large_steps = 0
    if bytes == 1:
        half.flags &= ~<uint8_t> HALF_PACED
        source.flags |= SIDE_READABLE
    else:
        half.flags |= HALF_PACED
    setsockopt(source.fd, SOL_SOCKET, SO_RCVLOWAT, &bytes, sizeof(bytes))


cdef inline bint half_pace(conn_t *conn, int h, uint64_t moved, uint64_t answered, bint expired) noexcept nogil:
    # Reads a stream in larger steps than the kernel offers by itself: each step costs a wake-up of ours, one of the destination and
    # an acknowledgement, whatever it carries. What network cards do with interrupts (coalescing), done by SO_RCVLOWAT and a hold.
    # Only while nothing goes the other way, so that nobody who waits for the end of an answer pays for it. `expired`: the hold was
    # over before PACE_BYTES had come. True: the source must be looked at again.
    cdef half_t *half = &conn.phase.half[h]
    cdef side_t *source = &conn.side[h]
    cdef bint fresh = half.flags & HALF_WAITS != 0
    if source.flags & SIDE_READABLE:
        half.flags &= ~<uint8_t> HALF_WAITS
    else:
        half.flags |= HALF_WAITS
    if half.flags & (HALF_ENDED | HALF_DROPPED):
        half.flags &= ~<uint8_t> HALF_PACED
    elif half.flags & HALF_PACED:
        if answered or (expired and moved < PACE_BYTES // 2):
            half_set_pace(half, source, 1)
            # A stream that paused is soon one again; one that is slower than this gains nothing, as when many share the processor.
            if not answered and moved < PACE_LARGE:
                half.large_steps = PACE_AFTER - 1
            return True
    elif answered:
        half.large_steps = 0
    elif moved and fresh:
        half.large_steps = half.large_steps + 1 if moved >= PACE_LARGE else 0
        if half.large_steps == PACE_AFTER:
            half_set_pace(half, source, PACE_BYTES)
    return False


cdef inline flow_t half_read(worker_t *worker, conn_t *conn, int h, uint32_t *moved, uint32_t limit) noexcept nogil:
    # One read, of no more than `limit`.
    if conn.phase.half[h].flags & HALF_SPLICE:
        return half_splice(worker, conn, h, moved, limit)
    if conn.side[h].tls != NULL or conn.side[1 - h].tls != NULL:
        return half_copy_tls(worker, conn, h, moved, limit)
    return half_copy(worker, conn, h, moved, limit)


cdef inline flow_t half_read_shaped(worker_t *worker, conn_t *conn, int h, uint32_t *moved) noexcept nogil:
    cdef uint32_t before = moved[0]
    cdef uint32_t limit = shaping_allow(worker, conn, h, BUDGET_BYTES)
    cdef flow_t flow
    if limit == 0:
        return FLOW_BLOCKED
    flow = half_read(worker, conn, h, moved, limit)
    shaping_spend(conn, h, moved[0] - before)
    return flow


cdef inline flow_t half_step(worker_t *worker, conn_t *conn, int h) noexcept nogil:
    # Moves bytes from side h to the other until something stops it. Never reads what it could not pass on or keep.
    cdef half_t *half = &conn.phase.half[h]
    cdef side_t *source = &conn.side[h]
    cdef side_t *sink = &conn.side[1 - h]
    cdef uint32_t moved = 0
    cdef flow_t flow = FLOW_MORE
    while flow == FLOW_MORE:
        if sink.tls != NULL and sink.tls.out_length:
            flow = tls_flush(sink, &conn.errno_seen)
        elif half.parked_length:
            flow = half_flush_parked(worker, conn, h)
        elif half.piped:
            flow = half_flush_pipe(worker, conn, h)
        elif half.flags & HALF_ENDED:
            flow = half_shut(worker, conn, h)
        elif not source.flags & (SIDE_READABLE | SIDE_PENDING):
            flow = FLOW_BLOCKED
        elif not sink.flags & SIDE_WRITABLE:
            flow = FLOW_BLOCKED
        elif moved >= BUDGET_BYTES:
            return FLOW_MORE
        elif conn.shaping != NULL:
            flow = half_read_shaped(worker, conn, h, &moved)
        else:
            flow = half_read(worker, conn, h, &moved, BUDGET_BYTES)
    if half.piped == 0:
        half_release_pipe(worker, half)
    if conn.shaping != NULL:
        shaping_settle(worker, conn, h)
    return flow
