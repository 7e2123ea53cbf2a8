# Implementation, inlined into _fastpath: one form for every address.
#
# IPv4 is kept in its IPv6-mapped form, so that equality, hashing and prefix matching are the same code for both families
# and a mapped address can't slip past a check that was written for the other one.

from libc.stdint cimport uint8_t, uint16_t, uint64_t
from libc.string cimport memcmp, memcpy

ctypedef struct address_t:
    uint8_t ip[16]
    uint16_t port      # host byte order


cdef inline bint address_is_v4(const address_t *a) noexcept nogil:
    return memcmp(a.ip, b"\0\0\0\0\0\0\0\0\0\0\xff\xff", 12) == 0


cdef inline bint address_equal(const address_t *a, const address_t *b) noexcept nogil:
    return a.port == b.port and memcmp(a.ip, b.ip, 16) == 0


cdef inline bint address_is_loopback(const address_t *a) noexcept nogil:
    if address_is_v4(a):
        return a.ip[12] == 127
    return memcmp(a.ip, b"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01", 16) == 0


cdef inline uint64_t mix64(uint64_t x) noexcept nogil:
    # The 64-bit finalizer of MurmurHash3 (Appleby): every input bit reaches every output bit.
    x ^= x >> 33
    x *= <uint64_t> 0xff51afd7ed558ccd
    x ^= x >> 33
    x *= <uint64_t> 0xc4ceb9fe1a85ec53
    x ^= x >> 33
    return x


cdef inline uint64_t address_hash_ip(const address_t *a, uint64_t seed) noexcept nogil:
    # The same on every node and in every process: consistent hashing depends on it.
    cdef uint64_t high, low
    memcpy(&high, a.ip, 8)
    memcpy(&low, &a.ip[8], 8)
    return mix64(mix64(high + seed) ^ (low * <uint64_t> 0x9e3779b97f4a7c15))


cdef inline uint64_t address_hash(const address_t *a, uint64_t seed) noexcept nogil:
    return mix64(address_hash_ip(a, seed) + a.port)
