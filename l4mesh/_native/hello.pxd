# Implementation, inlined into _fastpath: what a ClientHello says before anybody is authenticated: SNI, ALPN, and an l4mesh's hint.
#
# Source: RFC 8446, sections 4.1.2 and 5.1; RFC 6066, section 3; RFC 7301, section 3.1. The parser sees a stranger's bytes: every
# length is checked against what encloses it, and what does not add up is not a ClientHello. A hello may be spread over records;
# their payloads are joined in place, in a buffer that belongs to the caller.

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memmove

from l4mesh._native.types cimport LANE_HINTS

cdef enum:
    HELLO_MAX = 16384                # more than any client sends; browsers with post-quantum shares need 2 KiB
    HINT_EXTENSION = 0xff4c          # our own, of those for private use (RFC 8446, section 11): one byte, see lanes.pxd

cdef enum hello_parse_t:
    HELLO_PARTIAL = -1
    HELLO_NOT_TLS = -2               # plaintext of another protocol
    HELLO_INVALID = -3               # TLS to begin with, and then not
    HELLO_FOUND = 0

ctypedef struct hello_t:
    # Pieces of the buffer that was parsed; length 0: not sent.
    const uint8_t *sni
    uint32_t sni_length
    const uint8_t *alpn              # the list of names, each with one byte of length before it; well-formed
    uint32_t alpn_length
    uint8_t lane_hint                # 1 to LANE_HINTS; 0: not sent


cdef inline uint32_t get_u16(const uint8_t *at) noexcept nogil:
    return (<uint32_t> at[0] << 8) | at[1]


cdef inline bint hello_skip(const uint8_t *data, uint32_t end, uint32_t *at, uint32_t width) noexcept nogil:
    # Over a vector whose length has `width` bytes (1 or 2). False when it reaches past the end.
    cdef uint32_t length
    if end - at[0] < width:
        return False
    length = data[at[0]] if width == 1 else get_u16(data + at[0])
    if end - at[0] - width < length:
        return False
    at[0] += width + length
    return True


cdef inline bint hello_read_sni(const uint8_t *data, uint32_t length, hello_t *hello) noexcept nogil:
    cdef uint32_t name
    if length < 5 or get_u16(data) != length - 2 or data[2] != 0:
        return False
    name = get_u16(data + 3)
    if name == 0 or name != length - 5:
        return False
    hello.sni = data + 5
    hello.sni_length = name
    return True


cdef inline bint hello_read_alpn(const uint8_t *data, uint32_t length, hello_t *hello) noexcept nogil:
    cdef uint32_t at = 2
    if length < 4 or get_u16(data) != length - 2:
        return False
    while at < length:
        if data[at] == 0 or length - at - 1 < data[at]:
            return False
        at += 1 + data[at]
    hello.alpn = data + 2
    hello.alpn_length = length - 2
    return True


cdef inline uint8_t hint_read(const uint8_t *data, size_t length) noexcept nogil:
    # 0: no such hint.
    return data[0] if length == 1 and data[0] <= LANE_HINTS else 0


cdef inline int hello_parse(uint8_t *data, uint32_t length, hello_t *hello) noexcept nogil:
    # A hello_parse_t. Moves bytes within `data` when the hello is spread over several records.
    cdef uint32_t at = 0, joined = 0, body, size, end, kind
    hello.sni_length = 0
    hello.alpn_length = 0
    hello.lane_hint = 0
    if length and data[0] != 22:
        return HELLO_NOT_TLS
    if length > 1 and data[1] != 3:
        return HELLO_NOT_TLS
    # The records' payloads, joined from the start of the buffer until the hello is whole.
    while True:
        if length - at < 5:
            return HELLO_PARTIAL
        if data[at] != 22 or data[at + 1] != 3:
            return HELLO_INVALID
        body = get_u16(data + at + 3)
        if body == 0 or body > HELLO_MAX:
            return HELLO_INVALID
        if length - at - 5 < body:
            # The type of the message shows early whether it is worth waiting for the rest.
            if joined == 0 and length - at > 5 and data[at + 5] != 1:
                return HELLO_INVALID
            return HELLO_PARTIAL
        memmove(data + joined, data + at + 5, body)
        joined += body
        at += 5 + body
        if data[0] != 1:
            return HELLO_INVALID
        if joined >= 4:
            size = (<uint32_t> data[1] << 16) | get_u16(data + 2)
            if size > HELLO_MAX:
                return HELLO_INVALID
            if joined >= 4 + size:
                break
    end = 4 + size
    at = 4 + 2 + 32
    if at > end or not hello_skip(data, end, &at, 1) or not hello_skip(data, end, &at, 2) or not hello_skip(data, end, &at, 1):
        return HELLO_INVALID
    if at == end:
        return HELLO_FOUND
    if end - at < 2 or get_u16(data + at) != end - at - 2:
        return HELLO_INVALID
    at += 2
    while at < end:
        if end - at < 4:
            return HELLO_INVALID
        kind = get_u16(data + at)
        size = get_u16(data + at + 2)
        at += 4
        if end - at < size:
            return HELLO_INVALID
        # Said twice (RFC 8446, 4.2, forbids it), a name could be one thing to us and another to the server behind.
        if kind == 0 and (hello.sni_length or not hello_read_sni(data + at, size, hello)):
            return HELLO_INVALID
        if kind == 16 and (hello.alpn_length or not hello_read_alpn(data + at, size, hello)):
            return HELLO_INVALID
        if kind == HINT_EXTENSION:
            hello.lane_hint = hint_read(data + at, size)
        at += size
    return HELLO_FOUND
