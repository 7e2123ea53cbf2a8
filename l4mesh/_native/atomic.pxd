# Implementation, inlined into _fastpath: the few atomics that threads share, as gcc builtins that Cython can't express.
#
# Counters are relaxed: each is meaningful by itself. Pointers and ring positions use acquire and release. `_ordered` is for what two
# threads tell each other crosswise (places.pxd); on x86 it costs no more than relaxed.

from libc.stdint cimport int64_t, uint64_t

cdef extern from *:
    """
    #define l4_load(p) __atomic_load_n((p), __ATOMIC_RELAXED)
    #define l4_store(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
    #define l4_add(p, v) __atomic_fetch_add((p), (v), __ATOMIC_RELAXED)
    #define l4_load_acquire(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define l4_store_release(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    #define l4_load_ordered(p) __atomic_load_n((p), __ATOMIC_SEQ_CST)
    #define l4_add_ordered(p, v) __atomic_fetch_add((p), (v), __ATOMIC_SEQ_CST)
    #define l4_swap_if(p, seen, v) __atomic_compare_exchange_n((p), (seen), (v), 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)
    #define l4_exchange(p, v) __atomic_exchange_n((p), (v), __ATOMIC_ACQ_REL)
    #define l4_drop_ref(p) (__atomic_sub_fetch((p), 1, __ATOMIC_ACQ_REL))
    #define l4_load_pointer(p) ((void *) __atomic_load_n((p), __ATOMIC_ACQUIRE))
    #define l4_store_pointer(p, v) __atomic_store_n((p), (v), __ATOMIC_SEQ_CST)
    #define l4_exchange_pointer(p, v) ((void *) __atomic_exchange_n((p), (v), __ATOMIC_ACQ_REL))
    #define l4_replace_pointer(p, was, v) __sync_bool_compare_and_swap((p), (was), (v))
    #define l4_fence() __atomic_thread_fence(__ATOMIC_SEQ_CST)
    static inline int l4_swap(uint64_t *p, uint64_t expected, uint64_t value)
    {
        return __atomic_compare_exchange_n(p, &expected, value, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    }
    """
    int64_t load "l4_load"(const int64_t *p) noexcept nogil
    uint64_t load_u "l4_load"(const uint64_t *p) noexcept nogil
    void store "l4_store"(int64_t *p, int64_t value) noexcept nogil
    void store_u "l4_store"(uint64_t *p, uint64_t value) noexcept nogil
    int64_t add "l4_add"(int64_t *p, int64_t value) noexcept nogil
    uint64_t add_u "l4_add"(uint64_t *p, uint64_t value) noexcept nogil
    uint64_t load_acquire "l4_load_acquire"(const uint64_t *p) noexcept nogil
    void store_release "l4_store_release"(uint64_t *p, uint64_t value) noexcept nogil
    int64_t load_ordered "l4_load_ordered"(const int64_t *p) noexcept nogil
    int64_t add_ordered "l4_add_ordered"(int64_t *p, int64_t value) noexcept nogil
    bint swap_if "l4_swap_if"(int64_t *p, int64_t *seen, int64_t value) noexcept nogil
    bint swap_if_u "l4_swap_if"(uint64_t *p, uint64_t *seen, uint64_t value) noexcept nogil
    int64_t exchange "l4_exchange"(int64_t *p, int64_t value) noexcept nogil
    int64_t drop_ref "l4_drop_ref"(int64_t *p) noexcept nogil
    void *load_pointer "l4_load_pointer"(void **p) noexcept nogil
    void store_pointer "l4_store_pointer"(void **p, void *value) noexcept nogil
    void *exchange_pointer "l4_exchange_pointer"(void **p, void *value) noexcept nogil
    bint replace_pointer "l4_replace_pointer"(void **p, void *was, void *value) noexcept nogil
    void fence "l4_fence"() noexcept nogil
    bint swap_u "l4_swap"(uint64_t *p, uint64_t expected, uint64_t value) noexcept nogil
