# Implementation, inlined into _fastpath: places in a cluster, and the lines of those that wait for one.
#
# A connection that waits is not counted in the cluster's `active`; it stands in the line of its worker, and `waiting` counts the
# lines of all. Whoever gives a place back offers it to one worker that has a line, in turn, by its eventfd; that worker serves its
# line as far as there are places. A worker whose line becomes empty passes the offer on, since it may have been for more than it took.
#
# No wake-up is lost, though nothing is locked. One that joins a line counts itself in `waiting`, fences, and then looks for a place
# once more. One that gives a place back counts it off `active` and then looks at `waiting`; all four are sequentially consistent. In
# their single order either the count comes before the second look, which then finds the place, or the joining comes before the look at
# `waiting`, which then finds somebody. `places_offer` fences before it reads the rows, for the same reason. The mark `offered` saves
# eventfd writes: it is set with release after the place is free, and taken off with acquire before the line is served, and when a new
# line begins, before its first looks once more.

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from l4mesh._native.atomic cimport add_ordered, add_u, exchange, fence, load, load_acquire, store, store_release, swap_if
from l4mesh._native.linux cimport write
from l4mesh._native.queue cimport queue_push, queue_remove
from l4mesh._native.stats cimport cluster_row_t, cluster_stat_t
from l4mesh._native.types cimport QUEUED_LINE, conn_t, waiting_t, worker_t
from l4mesh._native.wheel cimport WHEEL_NONE


cdef inline bint place_take(int64_t *active, int64_t most) noexcept nogil:
    # One of `most` places (0: any number); never goes above, not even for a moment, so that a failure need not be made known.
    cdef int64_t seen = load(active)
    while most == 0 or seen < most:
        if swap_if(active, &seen, seen + 1):
            return True
    return False


cdef inline void places_offer(worker_t *worker, cluster_stat_t *stat) noexcept nogil:
    # Somebody waits, and a place may be free: tells one worker that has a line.
    cdef uint32_t n = worker.engine.n_workers
    cdef uint32_t i, at
    cdef uint64_t start, one = 1
    fence()
    start = add_u(&stat.turn, 1)
    for i in range(n):
        at = <uint32_t> ((start + i) % n)
        if load_acquire(<uint64_t *> &stat.rows[at].waiting) == 0:
            continue
        if exchange(&stat.rows[at].offered, 1) == 0:
            if at == worker.index:
                worker.serving = 1
            else:
                write(worker.engine.wake_fds[at], &one, sizeof(one))
        return


cdef inline bint line_join(worker_t *worker, conn_t *conn, uint32_t slot) noexcept nogil:
    # To the end of its worker's line. It is counted in the cluster's `waiting` already. False: no memory.
    cdef cluster_row_t *row = &conn.cluster_stat.rows[worker.index]
    cdef waiting_t *line = <waiting_t *> row.line
    if line == NULL:
        line = <waiting_t *> calloc(1, sizeof(waiting_t))
        if line == NULL:
            return False
        line.queue.head = line.queue.tail = WHEEL_NONE
        line.stat = conn.cluster_stat
        line.next = worker.lines
        if line.next != NULL:
            line.next.prev = line
        worker.lines = line
        row.line = line
        # An offer to the line before, which was empty when it came.
        exchange(&row.offered, 0)
    queue_push(worker, conn, slot, QUEUED_LINE)
    store_release(<uint64_t *> &row.waiting, row.waiting + 1)
    return True


cdef inline void line_leave(worker_t *worker, conn_t *conn) noexcept nogil:
    # Out of the line, if it is in one, and out of the count. One that was served has been counted in `active` before: what is in
    # neither may be freed.
    cdef cluster_stat_t *stat = conn.cluster_stat
    cdef cluster_row_t *row = &stat.rows[worker.index]
    cdef waiting_t *line = <waiting_t *> row.line
    cdef bint emptied = False
    if conn.queued == QUEUED_LINE:
        queue_remove(worker, conn)
        store(&row.waiting, row.waiting - 1)
        emptied = line.queue.head == WHEEL_NONE
    if emptied:
        if line.prev != NULL:
            line.prev.next = line.next
        else:
            worker.lines = line.next
        if line.next != NULL:
            line.next.prev = line.prev
        free(line)
        row.line = NULL
    if add_ordered(&stat.waiting, -1) > 1 and emptied:
        places_offer(worker, stat)
