# Implementation, inlined into _fastpath: SPIFFE IDs and the patterns that configuration compares them with.
#
# Source: the SPIFFE-ID standard (spiffe.io, SPIFFE-ID.md, section 2): the grammar is small, and an ID that keeps it is compared byte by
# byte. Everything here works on a length, never on a terminator: a NUL is a byte that the grammar does not allow.

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp

cdef enum:
    SPIFFE_MAX = 2048            # section 2.3: support for up to 2048 bytes is required
    SPIFFE_SCHEME = 9            # len("spiffe://")

cdef enum pattern_kind_t:
    PATTERN_EXACT = 0
    PATTERN_PREFIX = 1
    PATTERN_SUFFIX = 2
    PATTERN_ANY = 3              # presence: any identity

ctypedef struct text_t:
    # A piece of somebody else's bytes.
    const char *at
    uint32_t length

ctypedef struct pattern_t:
    uint32_t offset              # in the owner's pool of text
    uint32_t length
    uint8_t kind

ctypedef struct spiffe_t:
    text_t whole
    text_t trust_domain
    text_t namespace             # of /ns/NAMESPACE/sa/ACCOUNT, the layout that Istio and SPIRE use; else empty
    text_t account


cdef inline bint text_equal(const text_t *a, const char *b, uint32_t length) noexcept nogil:
    return a.length == length and memcmp(a.at, b, length) == 0


cdef inline bint spiffe_char(uint8_t c, bint in_path) noexcept nogil:
    if 97 <= c <= 122 or 48 <= c <= 57 or c == 46 or c == 45 or c == 95:
        return True
    return in_path and 65 <= c <= 90


cdef inline bint spiffe_parse(const char *text, uint32_t length, spiffe_t *parsed) noexcept nogil:
    # False when the bytes are not the SPIFFE ID of a workload: with a trust domain, and with a path, which only signers lack.
    cdef uint32_t at = SPIFFE_SCHEME, start, part = 0
    cdef bint is_ns = False, is_sa = False
    parsed.whole.at = text
    parsed.whole.length = length
    parsed.namespace.length = 0
    parsed.account.length = 0
    if length > SPIFFE_MAX or length <= SPIFFE_SCHEME or memcmp(text, b"spiffe://", SPIFFE_SCHEME) != 0:
        return False
    while at < length and text[at] != 47:
        if not spiffe_char(<uint8_t> text[at], False):
            return False
        at += 1
    parsed.trust_domain.at = text + SPIFFE_SCHEME
    parsed.trust_domain.length = at - SPIFFE_SCHEME
    if at == SPIFFE_SCHEME or at - SPIFFE_SCHEME > 255 or at == length:
        return False
    while at < length:
        at += 1
        start = at
        while at < length and text[at] != 47:
            if not spiffe_char(<uint8_t> text[at], True):
                return False
            at += 1
        # No empty segments, no "." and no "..".
        if at == start or (at - start == 1 and text[start] == 46) or (at - start == 2 and memcmp(text + start, b"..", 2) == 0):
            return False
        if part == 0:
            is_ns = at - start == 2 and memcmp(text + start, b"ns", 2) == 0
        elif part == 1:
            parsed.namespace.at = text + start
            parsed.namespace.length = at - start
        elif part == 2:
            is_sa = at - start == 2 and memcmp(text + start, b"sa", 2) == 0
        elif part == 3:
            parsed.account.at = text + start
            parsed.account.length = at - start
        part += 1
    if part != 4 or not is_ns or not is_sa:
        parsed.namespace.length = 0
        parsed.account.length = 0
    return True


cdef inline bint pattern_matches(const pattern_t *pattern, const char *pool, const text_t *text) noexcept nogil:
    # An empty text is a peer without an identity: no pattern matches it, presence least of all.
    if text.length == 0 or pattern.length > text.length:
        return False
    if pattern.kind == PATTERN_EXACT:
        return text_equal(text, pool + pattern.offset, pattern.length)
    if pattern.kind == PATTERN_PREFIX:
        return memcmp(text.at, pool + pattern.offset, pattern.length) == 0
    if pattern.kind == PATTERN_SUFFIX:
        return memcmp(text.at + text.length - pattern.length, pool + pattern.offset, pattern.length) == 0
    return True


cdef inline uint64_t fnv_start() noexcept nogil:
    return <uint64_t> 0xcbf29ce484222325


cdef inline uint64_t fnv_add(uint64_t hash, uint8_t byte) noexcept nogil:
    # FNV-1a (Fowler, Noll, Vo): one byte at a time, so that the hashes of all prefixes come out of one pass.
    return (hash ^ byte) * <uint64_t> 0x100000001b3


cdef inline uint64_t fnv(const char *text, uint32_t length) noexcept nogil:
    cdef uint64_t hash = fnv_start()
    cdef uint32_t i
    for i in range(length):
        hash = fnv_add(hash, <uint8_t> text[i])
    return hash


cdef inline uint64_t fnv_reversed(const char *text, uint32_t length) noexcept nogil:
    cdef uint64_t hash = fnv_start()
    cdef uint32_t i
    for i in range(length):
        hash = fnv_add(hash, <uint8_t> text[length - 1 - i])
    return hash
