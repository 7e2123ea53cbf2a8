# Implementation, inlined into _fastpath: the PROXY protocol, versions 1 and 2.
#
# Source: haproxy.org, doc/proxy-protocol.txt, sections 2.1 and 2.2. The parser sees bytes of a peer before anything else is known of
# it: it never reads past what it was given, never past the length that the header itself declares, and takes only whole headers.

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcmp, memcpy, memset

from l4mesh._native.address cimport address_is_v4, address_t

cdef enum:
    PROXY_V1_MAX = 107           # section 2.1: the longest line, CRLF included
    PROXY_V2_FIXED = 16
    PROXY_MAX = 536              # what we look at: more than any real header with its TLVs, and never more than one segment

cdef enum proxy_parse_t:
    PROXY_PARTIAL = -1
    PROXY_INVALID = -2
    # otherwise: the length of the header, to be taken off the stream


cdef inline uint32_t put_decimal(uint8_t *out, uint32_t value) noexcept nogil:
    cdef uint8_t digits[10]
    cdef uint32_t n = 0, i
    while True:
        digits[n] = <uint8_t> (48 + value % 10)
        n += 1
        value //= 10
        if value == 0:
            break
    for i in range(n):
        out[i] = digits[n - 1 - i]
    return n


cdef inline uint32_t put_hex(uint8_t *out, uint32_t value) noexcept nogil:
    cdef uint32_t n = 0
    cdef int shift = 12
    cdef uint32_t digit
    while shift >= 0:
        digit = (value >> shift) & 15
        if digit or n or shift == 0:
            out[n] = <uint8_t> (digit + 48 if digit < 10 else digit + 87)
            n += 1
        shift -= 4
    return n


cdef inline uint32_t put_ip(uint8_t *out, const address_t *address, bint as_v4) noexcept nogil:
    # Full form without "::", which every parser takes.
    cdef uint32_t n = 0
    cdef int i
    for i in range(4 if as_v4 else 8):
        if i:
            out[n] = 46 if as_v4 else 58
            n += 1
        if as_v4:
            n += put_decimal(out + n, address.ip[12 + i])
        else:
            n += put_hex(out + n, (<uint32_t> address.ip[2 * i] << 8) | address.ip[2 * i + 1])
    return n


cdef inline uint32_t proxy_write_v1(uint8_t *out, const address_t *source, const address_t *destination) noexcept nogil:
    # Returns the length, at most PROXY_V1_MAX.
    cdef bint as_v4 = address_is_v4(source) and address_is_v4(destination)
    cdef uint32_t n = 11
    memcpy(out, b"PROXY TCP4 " if as_v4 else b"PROXY TCP6 ", 11)
    n += put_ip(out + n, source, as_v4)
    out[n] = 32
    n += 1
    n += put_ip(out + n, destination, as_v4)
    out[n] = 32
    n += 1
    n += put_decimal(out + n, source.port)
    out[n] = 32
    n += 1
    n += put_decimal(out + n, destination.port)
    out[n] = 13
    out[n + 1] = 10
    return n + 2


cdef inline uint32_t proxy_write_v2(uint8_t *out, const address_t *source, const address_t *destination) noexcept nogil:
    # Returns the length: 28 for IPv4, 52 for IPv6.
    cdef bint as_v4 = address_is_v4(source) and address_is_v4(destination)
    cdef uint32_t size = 4 if as_v4 else 16
    cdef uint32_t n = PROXY_V2_FIXED
    memcpy(out, b"\r\n\r\n\0\r\nQUIT\n", 12)
    out[12] = 0x21
    out[13] = 0x11 if as_v4 else 0x21
    out[14] = 0
    out[15] = <uint8_t> (2 * size + 4)
    memcpy(out + n, &source.ip[16 - size], size)
    memcpy(out + n + size, &destination.ip[16 - size], size)
    n += 2 * size
    out[n] = <uint8_t> (source.port >> 8)
    out[n + 1] = <uint8_t> (source.port & 255)
    out[n + 2] = <uint8_t> (destination.port >> 8)
    out[n + 3] = <uint8_t> (destination.port & 255)
    return n + 4


cdef inline void address_set(address_t *address, const uint8_t *ip, uint32_t size, uint16_t port) noexcept nogil:
    # From 4 or 16 bytes of IP.
    memset(address.ip, 0, 10)
    address.ip[10] = 0xff
    address.ip[11] = 0xff
    memcpy(&address.ip[16 - size], ip, size)
    address.port = port


cdef inline int proxy_parse_v2(
    const uint8_t *data, uint32_t length, address_t *source, address_t *destination
) noexcept nogil:
    cdef uint32_t total, size, family, command
    cdef const uint8_t *at
    if length < PROXY_V2_FIXED:
        return PROXY_PARTIAL
    total = PROXY_V2_FIXED + ((<uint32_t> data[14] << 8) | data[15])
    command = data[12] & 15
    family = data[13]
    if data[12] >> 4 != 2 or command > 1 or total > PROXY_MAX:
        return PROXY_INVALID
    if family >> 4 > 3 or family & 15 > 2:
        return PROXY_INVALID
    # LOCAL (a health check of the sender's own) and families other than TCP over IP keep the real addresses.
    size = 4 if family == 0x11 else 16
    if command == 1 and (family == 0x11 or family == 0x21) and total < PROXY_V2_FIXED + 2 * size + 4:
        return PROXY_INVALID
    if length < total:
        return PROXY_PARTIAL
    if command == 1 and (family == 0x11 or family == 0x21):
        at = data + PROXY_V2_FIXED
        address_set(source, at, size, (<uint16_t> at[2 * size] << 8) | at[2 * size + 1])
        address_set(destination, at + size, size, (<uint16_t> at[2 * size + 2] << 8) | at[2 * size + 3])
    return <int> total


cdef inline int take_decimal(const uint8_t *data, uint32_t *at, uint32_t end, uint32_t most) noexcept nogil:
    # A decimal number without leading zeros up to `most`, or -1.
    cdef uint32_t value = 0, first = at[0]
    while at[0] < end and 48 <= data[at[0]] <= 57:
        value = value * 10 + data[at[0]] - 48
        at[0] += 1
        if value > most or (at[0] - first > 1 and data[first] == 48):
            return -1
    return -1 if at[0] == first else <int> value


cdef inline bint take_v4(const uint8_t *data, uint32_t *at, uint32_t end, uint8_t *ip) noexcept nogil:
    cdef int i, part
    for i in range(4):
        if i:
            if at[0] >= end or data[at[0]] != 46:
                return False
            at[0] += 1
        part = take_decimal(data, at, end, 255)
        if part < 0:
            return False
        ip[i] = <uint8_t> part
    return True


cdef inline int take_group(const uint8_t *data, uint32_t *at, uint32_t end) noexcept nogil:
    # One to four hexadecimal digits, or -1.
    cdef uint32_t value = 0
    cdef int n = 0
    cdef uint8_t c
    while at[0] < end and n < 4:
        c = data[at[0]]
        if 48 <= c <= 57:
            value = value * 16 + c - 48
        elif 97 <= c <= 102:
            value = value * 16 + c - 87
        elif 65 <= c <= 70:
            value = value * 16 + c - 55
        else:
            break
        at[0] += 1
        n += 1
    return <int> value if n else -1


cdef inline bint take_v6(const uint8_t *data, uint32_t *at, uint32_t end, uint8_t *ip) noexcept nogil:
    # RFC 4291 text without an embedded IPv4 part, which the PROXY protocol does not use.
    cdef uint8_t parts[16]
    cdef int n = 0, gap = -1, group
    memset(parts, 0, 16)
    if end - at[0] >= 2 and data[at[0]] == 58 and data[at[0] + 1] == 58:
        gap = 0
        at[0] += 2
    while n < 8 and at[0] < end and data[at[0]] != 32:
        group = take_group(data, at, end)
        if group < 0:
            return False
        parts[2 * n] = <uint8_t> (group >> 8)
        parts[2 * n + 1] = <uint8_t> (group & 255)
        n += 1
        if at[0] >= end or data[at[0]] != 58:
            break
        at[0] += 1
        if at[0] < end and data[at[0]] == 58:
            if gap >= 0:
                return False
            gap = n
            at[0] += 1
        elif at[0] >= end or data[at[0]] == 32:
            return False
    if (gap < 0 and n != 8) or (gap >= 0 and n == 8):
        return False
    memset(ip, 0, 16)
    if gap < 0:
        memcpy(ip, parts, 16)
        return True
    memcpy(ip, parts, 2 * gap)
    memcpy(ip + 16 - 2 * (n - gap), parts + 2 * gap, 2 * (n - gap))
    return True


cdef inline int proxy_parse_v1(
    const uint8_t *data, uint32_t length, address_t *source, address_t *destination
) noexcept nogil:
    cdef uint32_t end = 0, at = 11
    cdef uint8_t ips[32]
    cdef int ports[2]
    cdef int i
    cdef bint as_v4
    while end + 1 < length and end + 1 < PROXY_V1_MAX and not (data[end] == 13 and data[end + 1] == 10):
        end += 1
    if end + 1 >= PROXY_V1_MAX:
        return PROXY_INVALID
    if end + 1 >= length:
        return PROXY_PARTIAL
    if end >= 13 and memcmp(data, b"PROXY UNKNOWN", 13) == 0:
        return <int> end + 2
    as_v4 = end > 11 and memcmp(data, b"PROXY TCP4 ", 11) == 0
    if not as_v4 and (end <= 11 or memcmp(data, b"PROXY TCP6 ", 11) != 0):
        return PROXY_INVALID
    for i in range(2):
        if not (take_v4(data, &at, end, ips + 16 * i) if as_v4 else take_v6(data, &at, end, ips + 16 * i)):
            return PROXY_INVALID
        if at >= end or data[at] != 32:
            return PROXY_INVALID
        at += 1
    for i in range(2):
        ports[i] = take_decimal(data, &at, end, 65535)
        if ports[i] < 0 or (i == 0 and (at >= end or data[at] != 32)):
            return PROXY_INVALID
        if i == 0:
            at += 1
    if at != end:
        return PROXY_INVALID
    address_set(source, ips, 4 if as_v4 else 16, <uint16_t> ports[0])
    address_set(destination, ips + 16, 4 if as_v4 else 16, <uint16_t> ports[1])
    return <int> end + 2


cdef inline int proxy_parse(const uint8_t *data, uint32_t length, address_t *source, address_t *destination) noexcept nogil:
    # The header's length, PROXY_PARTIAL or PROXY_INVALID. Writes the addresses only where the header has them.
    cdef uint32_t shared
    if length == 0:
        return PROXY_PARTIAL
    if data[0] == 13:
        shared = length if length < 12 else 12
        if memcmp(data, b"\r\n\r\n\0\r\nQUIT\n", shared) != 0:
            return PROXY_INVALID
        return PROXY_PARTIAL if length < 12 else proxy_parse_v2(data, length, source, destination)
    shared = length if length < 6 else 6
    if memcmp(data, b"PROXY ", shared) != 0:
        return PROXY_INVALID
    return PROXY_PARTIAL if length < 6 else proxy_parse_v1(data, length, source, destination)
