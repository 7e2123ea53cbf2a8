# Implementation, inlined into _fastpath: live connections by source address, one exact count for all workers.
#
# A chained hash table under 256 spin locks; a lock is held for the walk of one short chain. Used only while a limit by source is
# set, so that others pay nothing.

from libc.stdint cimport int64_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy

from l4mesh._native.address cimport address_hash_ip, address_t
from l4mesh._native.atomic cimport exchange, store
from l4mesh._native.types cimport source_t, sources_t

cdef extern from *:
    """
    #include <sched.h>
    """
    int sched_yield() noexcept nogil


cdef inline void source_lock(int64_t *lock) noexcept nogil:
    # sched_yield: a holder that lost its CPU must get it back on a machine with fewer CPUs than workers.
    while exchange(lock, 1):
        sched_yield()


cdef inline void source_unlock(int64_t *lock) noexcept nogil:
    exchange(lock, 0)


cdef inline bint source_take(sources_t *table, const address_t *address, int64_t limit, source_t **taken) noexcept nogil:
    # Counts one more connection of the source; false when it has `limit` already. *taken is NULL when there is no memory.
    cdef uint32_t at = <uint32_t> address_hash_ip(address, table.seed) & 0xffff
    cdef int64_t *lock = &table.locks[at & 255]
    cdef source_t *source
    cdef bint fits = True
    source_lock(lock)
    source = table.heads[at]
    while source != NULL and memcmp(source.ip, address.ip, 16) != 0:
        source = source.next
    if source == NULL:
        source = <source_t *> malloc(sizeof(source_t))
        if source != NULL:
            source.active = 1
            memcpy(source.ip, address.ip, 16)
            source.next = table.heads[at]
            table.heads[at] = source
    elif source.active >= limit:
        fits = False
        source = NULL
    else:
        source.active += 1
    source_unlock(lock)
    taken[0] = source
    return fits


cdef inline void source_give(sources_t *table, source_t *source) noexcept nogil:
    cdef address_t address
    memcpy(address.ip, source.ip, 16)
    cdef uint32_t at = <uint32_t> address_hash_ip(&address, table.seed) & 0xffff
    cdef int64_t *lock = &table.locks[at & 255]
    cdef source_t **link
    source_lock(lock)
    source.active -= 1
    if source.active == 0:
        link = &table.heads[at]
        while link[0] != source:
            link = &link[0].next
        link[0] = source.next
        free(source)
    source_unlock(lock)
