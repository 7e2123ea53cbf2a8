"""Seeded fuzzing, guided by coverage, of what parses the bytes of a peer that nobody knows yet. Never part of a wheel.

Inputs are mutations of a corpus; one that reaches an edge of the parser that none has reached before joins the corpus (the way of AFL;
the compiler's ``-fsanitize-coverage=trace-pc`` calls us at every edge). Each is parsed at the end of a page before one that nobody may
read, so that a read past the end is a crash in every build. The same seed makes the same inputs.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memmove, memset

from l4mesh._native.address cimport address_equal, address_t
from l4mesh._native.hello cimport HELLO_FOUND, HELLO_PARTIAL, hello_parse, hello_t, hint_read
from l4mesh._native.proxy_protocol cimport (
    PROXY_INVALID, PROXY_MAX, PROXY_PARTIAL, PROXY_V1_MAX, proxy_parse, proxy_write_v1, proxy_write_v2,
)
from l4mesh._native.spiffe cimport spiffe_parse, spiffe_t, text_t

cdef extern from *:
    """
    #include <openssl/err.h>
    #include <openssl/ssl.h>
    #include <sys/mman.h>
    /* Volatile: the calls come into being after the optimizer has looked. */
    static volatile uint8_t l4_edges[1 << 16];
    static volatile uint32_t l4_edge, l4_tracing, l4_discovered;
    /* Places in the code count from a place of ours, so that where the library is loaded makes no difference. */
    __attribute__((no_sanitize_coverage, visibility("hidden"))) void __sanitizer_cov_trace_pc(void)
    {
        uint64_t at = (uint64_t) ((char *) __builtin_return_address(0) - (char *) l4_edges) * 0x9e3779b97f4a7c15u >> 48;
        volatile uint8_t *edge = &l4_edges[(at ^ l4_edge) & 0xffff];
        if (!l4_tracing) return;
        l4_edge = (uint32_t) at >> 1;
        if (!*edge) { *edge = 1; l4_discovered = 1; }
    }
    static void l4_forget_edges(void) { memset((void *) l4_edges, 0, sizeof(l4_edges)); }
    static void l4_trace(int on) { l4_tracing = on; if (on) l4_edge = l4_discovered = 0; }
    static uint8_t *l4_map_guarded(size_t size)
    {
        uint8_t *start = mmap(NULL, size + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (start == MAP_FAILED || mprotect(start + size, 4096, PROT_NONE)) return NULL;
        return start;
    }
    static void l4_unmap_guarded(uint8_t *start, size_t size) { munmap(start, size + 4096); }
    /* What OpenSSL finds in a hello: the raw server_name, ALPN and hint extensions. False: it refuses or wants more. */
    struct l4_names { const uint8_t *sni, *alpn, *hint; size_t sni_length, alpn_length, hint_length; int found; };
    static int l4_hello_callback(SSL *ssl, int *alert, void *argument)
    {
        struct l4_names *names = SSL_get_ex_data(ssl, 0);
        names->found = 1;
        if (!SSL_client_hello_get0_ext(ssl, 0, &names->sni, &names->sni_length)) names->sni_length = 0;
        if (!SSL_client_hello_get0_ext(ssl, 16, &names->alpn, &names->alpn_length)) names->alpn_length = 0;
        if (!SSL_client_hello_get0_ext(ssl, 0xff4c, &names->hint, &names->hint_length)) names->hint_length = 0;
        return SSL_CLIENT_HELLO_RETRY;
    }
    static SSL_CTX *l4_reader_new(void)
    {
        SSL_CTX *ctx = SSL_CTX_new(TLS_server_method());
        if (ctx) SSL_CTX_set_client_hello_cb(ctx, l4_hello_callback, NULL);
        /* It tells only of extensions that it knows. */
        if (ctx) SSL_CTX_add_custom_ext(ctx, 0xff4c, SSL_EXT_CLIENT_HELLO, NULL, NULL, NULL, NULL, NULL);
        return ctx;
    }
    """
    void l4_forget_edges() noexcept nogil
    void l4_trace(bint on) noexcept nogil
    uint32_t l4_discovered
    uint8_t *l4_map_guarded(size_t size) noexcept nogil
    void l4_unmap_guarded(uint8_t *start, size_t size) noexcept nogil
    ctypedef struct names_t "struct l4_names":
        const uint8_t *sni
        const uint8_t *alpn
        const uint8_t *hint
        size_t sni_length, alpn_length, hint_length
        int found
    ctypedef struct SSL:
        pass
    ctypedef struct SSL_CTX:
        pass
    ctypedef struct BIO:
        pass
    SSL_CTX *l4_reader_new() noexcept nogil
    void SSL_CTX_free(SSL_CTX *ctx) noexcept nogil
    SSL *SSL_new(SSL_CTX *ctx) noexcept nogil
    void SSL_free(SSL *ssl) noexcept nogil
    int SSL_set_ex_data(SSL *ssl, int index, void *data) noexcept nogil
    void SSL_set_bio(SSL *ssl, BIO *read_bio, BIO *write_bio) noexcept nogil
    void SSL_set_accept_state(SSL *ssl) noexcept nogil
    int SSL_do_handshake(SSL *ssl) noexcept nogil
    BIO *BIO_new_mem_buf(const void *data, int length) noexcept nogil
    void *BIO_s_null() noexcept nogil
    BIO *BIO_new(void *method) noexcept nogil
    void ERR_clear_error() noexcept nogil

cdef enum:
    INPUT_MAX = 4096
    ROOM = 6 * INPUT_MAX + 4096      # a hello in records of one byte; rounded up to pages below
    CORPUS_MAX = 4096
    OUTCOMES = 5

cdef enum target_t:
    TARGET_HELLO
    TARGET_PROXY
    TARGET_SPIFFE

cdef enum fault_t:
    SOUND
    FAULT_OUTSIDE                # a result that points outside of the input
    FAULT_PREFIX                 # a prefix that is answered otherwise than the whole
    FAULT_FRAMES                 # the same message in other records, and another result
    FAULT_OPENSSL                # OpenSSL reads another name in it
    FAULT_ADDRESS                # addresses written though there is no header, or that don't survive being written out
    FAULT_GRAMMAR                # an ID that does not keep the grammar, or is taken apart wrongly

FAULTS = ("", "outside", "prefix", "frames", "openssl", "address", "grammar")

ctypedef struct fuzz_t:
    int target
    uint8_t *room                # ROOM bytes before the guard
    uint8_t **inputs
    uint32_t *lengths
    uint32_t n
    uint64_t random
    uint8_t work[INPUT_MAX]
    uint32_t length
    uint64_t outcomes[OUTCOMES]
    SSL_CTX *reader


cdef inline uint32_t below(fuzz_t *f, uint32_t bound) noexcept nogil:
    # xorshift64* (Vigna 2016).
    f.random ^= f.random >> 12
    f.random ^= f.random << 25
    f.random ^= f.random >> 27
    return <uint32_t> ((f.random * <uint64_t> 0x2545f4914f6cdd1d) >> 33) % bound if bound else 0


# -- mutation ------------------------------------------------------------------------------------------------------------------

cdef inline void make_gap(fuzz_t *f, uint32_t at, uint32_t size) noexcept nogil:
    memmove(f.work + at + size, f.work + at, f.length - at)
    f.length += size


cdef void mutate_once(fuzz_t *f) noexcept nogil:
    cdef uint32_t at = below(f, f.length), size, other
    cdef uint32_t what = below(f, 10)
    if f.length == 0:
        what = 6
    if what == 0:
        f.work[at] ^= <uint8_t> (1 << below(f, 8))
    elif what == 1:
        f.work[at] = <uint8_t> below(f, 256)
    elif what == 2:
        # A length a little wrong, or at its bounds.
        f.work[at] = <uint8_t> (f.work[at] + below(f, 5) - 2)
    elif what == 3:
        f.work[at] = b"\x00\x01\x7f\x80\xff\x16\x03\r\n/.: 09"[below(f, 15)]
    elif what == 4 and f.length >= 2:
        at = below(f, f.length - 1)
        size = f.length - at - 2 + below(f, 3) - 1 if below(f, 2) else (0xffff if below(f, 2) else below(f, 2))
        f.work[at] = <uint8_t> (size >> 8)
        f.work[at + 1] = <uint8_t> size
    elif what == 5:
        # A part taken out,
        size = 1 + below(f, f.length - at if f.length - at < 64 else 64)
        if size > f.length - at:
            size = f.length - at
        memmove(f.work + at, f.work + at + size, f.length - at - size)
        f.length -= size
    elif what == 6:
        # put in,
        size = 1 + below(f, 16)
        if f.length + size <= INPUT_MAX:
            make_gap(f, at, size)
            memset(f.work + at, <int> below(f, 256), size)
    elif what == 7:
        # or said twice.
        size = 1 + below(f, f.length - at)
        if f.length + size <= INPUT_MAX:
            make_gap(f, at, size)
            memmove(f.work + at, f.work + at + size, size)
    elif what == 8:
        # The end of another input.
        other = below(f, f.n)
        size = below(f, f.lengths[other] + 1)
        if at + f.lengths[other] - size <= INPUT_MAX:
            memcpy(f.work + at, f.inputs[other] + size, f.lengths[other] - size)
            f.length = at + f.lengths[other] - size
    else:
        f.length = at


cdef void mutate(fuzz_t *f) noexcept nogil:
    # The next input, in `work`.
    cdef uint32_t from_ = below(f, f.n), _i
    memcpy(f.work, f.inputs[from_], f.lengths[from_])
    f.length = f.lengths[from_]
    for _i in range(1 + below(f, 6)):
        mutate_once(f)


cdef bint corpus_add(fuzz_t *f, const uint8_t *data, uint32_t length) noexcept nogil:
    cdef uint8_t *copy
    if f.n == CORPUS_MAX or length > INPUT_MAX:
        return False
    copy = <uint8_t *> malloc(length + 1)
    if copy == NULL:
        return False
    memcpy(copy, data, length)
    f.inputs[f.n] = copy
    f.lengths[f.n] = length
    f.n += 1
    return True


# -- what must hold ------------------------------------------------------------------------------------------------------------

cdef inline uint8_t *place(fuzz_t *f, const uint8_t *data, uint32_t length) noexcept nogil:
    # A copy that ends where nobody may read.
    cdef uint8_t *at = f.room + ROOM - length
    memcpy(at, data, length)
    return at


cdef inline bint lies_in(const uint8_t *piece, uint32_t size, const uint8_t *whole, uint32_t length) noexcept nogil:
    return size == 0 or (piece >= whole and piece + size <= whole + length)


cdef inline bint text_lies_in(const text_t *text, const uint8_t *whole, uint32_t length) noexcept nogil:
    return lies_in(<const uint8_t *> text.at, text.length, whole, length)


cdef inline bint same(const uint8_t *a, uint32_t a_length, const uint8_t *b, uint32_t b_length) noexcept nogil:
    return a_length == b_length and (a_length == 0 or memcmp(a, b, a_length) == 0)


cdef inline bint hello_same(const hello_t *a, const hello_t *b) noexcept nogil:
    return (
        same(a.sni, a.sni_length, b.sni, b.sni_length) and same(a.alpn, a.alpn_length, b.alpn, b.alpn_length)
        and a.lane_hint == b.lane_hint
    )


cdef int hello_as_openssl(fuzz_t *f, const hello_t *hello) noexcept nogil:
    cdef SSL *ssl = SSL_new(f.reader)
    cdef names_t names
    cdef int fault = SOUND
    memset(&names, 0, sizeof(names))
    SSL_set_ex_data(ssl, 0, &names)
    SSL_set_bio(ssl, BIO_new_mem_buf(f.work, <int> f.length), BIO_new(BIO_s_null()))
    SSL_set_accept_state(ssl)
    SSL_do_handshake(ssl)
    if names.found:
        f.outcomes[4] += 1
        # Ours are what the lists enclose: after the list's length, and for a name also its type and length.
        if names.sni_length != (hello.sni_length + 5 if hello.sni_length else 0):
            fault = FAULT_OPENSSL
        elif hello.sni_length and memcmp(names.sni + 5, hello.sni, hello.sni_length) != 0:
            fault = FAULT_OPENSSL
        elif names.alpn_length != (hello.alpn_length + 2 if hello.alpn_length else 0):
            fault = FAULT_OPENSSL
        elif hello.alpn_length and memcmp(names.alpn + 2, hello.alpn, hello.alpn_length) != 0:
            fault = FAULT_OPENSSL
        elif hello.lane_hint != (hint_read(names.hint, names.hint_length) if names.hint_length else 0):
            fault = FAULT_OPENSSL
    SSL_free(ssl)
    ERR_clear_error()
    return fault


cdef int check_hello(fuzz_t *f, bint thorough) noexcept nogil:
    cdef hello_t hello, again
    cdef uint8_t kept[INPUT_MAX]
    cdef uint8_t *at = place(f, f.work, f.length)
    cdef uint8_t *out
    cdef int found, part
    cdef uint32_t cut, step, size, n, message = 0
    memset(&hello, 0, sizeof(hello))
    l4_trace(True)
    found = hello_parse(at, f.length, &hello)
    l4_trace(False)
    f.outcomes[-found] += 1
    if found != HELLO_FOUND:
        hello.sni_length = hello.alpn_length = 0
    if not lies_in(hello.sni, hello.sni_length, at, f.length) or not lies_in(hello.alpn, hello.alpn_length, at, f.length):
        return FAULT_OUTSIDE
    if found == HELLO_FOUND:
        message = 4 + ((<uint32_t> at[1] << 16) | (<uint32_t> at[2] << 8) | at[3])
    memcpy(kept, at, f.length)
    hello.sni = kept + (hello.sni - at) if hello.sni_length else NULL
    hello.alpn = kept + (hello.alpn - at) if hello.alpn_length else NULL
    # A part of it is unfinished, or answered as the whole is.
    step = 1 if thorough else 1 + below(f, f.length)
    cut = 0 if thorough else below(f, 16)
    while cut < f.length:
        at = place(f, f.work, cut)
        part = hello_parse(at, cut, &again)
        if part != HELLO_PARTIAL and (part != found or (part == HELLO_FOUND and not hello_same(&hello, &again))):
            return FAULT_PREFIX
        cut += step
    if found != HELLO_FOUND:
        return SOUND
    # The same message, spread over records by chance.
    out = f.room
    cut = 0
    while cut < message:
        size = 1 + below(f, message - cut if below(f, 4) == 0 else 3)
        if size > message - cut:
            size = message - cut
        out[0], out[1], out[2], out[3], out[4] = 22, 3, 1, <uint8_t> (size >> 8), <uint8_t> size
        memcpy(out + 5, kept + cut, size)
        out += 5 + size
        cut += size
    n = <uint32_t> (out - f.room)
    memmove(f.room + ROOM - n, f.room, n)
    if hello_parse(f.room + ROOM - n, n, &again) != HELLO_FOUND or not hello_same(&hello, &again):
        return FAULT_FRAMES
    return hello_as_openssl(f, &hello)


cdef int check_proxy(fuzz_t *f, bint thorough) noexcept nogil:
    cdef address_t source, destination, source_again, destination_again, untouched
    cdef uint8_t out[128]
    cdef uint32_t length = f.length if f.length < PROXY_MAX else PROXY_MAX
    cdef uint32_t cut, step, version, n
    cdef int found, part
    memset(&untouched, 0xa5, sizeof(untouched))
    source = destination = untouched
    l4_trace(True)
    found = proxy_parse(place(f, f.work, length), length, &source, &destination)
    l4_trace(False)
    f.outcomes[-found if found < 0 else 0] += 1
    if found > <int> length or found == 0 or found < PROXY_INVALID:
        return FAULT_OUTSIDE
    if found < 0 and memcmp(&source, &untouched, sizeof(source)) != 0:
        return FAULT_ADDRESS
    step = 1 if thorough else 1 + below(f, length)
    cut = 0 if thorough else below(f, 16)
    while cut < length:
        source_again = destination_again = untouched
        part = proxy_parse(place(f, f.work, cut), cut, &source_again, &destination_again)
        if part != PROXY_PARTIAL and part != found:
            return FAULT_PREFIX
        if part > 0 and not (address_equal(&source, &source_again) and address_equal(&destination, &destination_again)):
            return FAULT_PREFIX
        cut += step
    if found < 0 or memcmp(&source, &untouched, sizeof(source)) == 0:
        return SOUND
    for version in range(1, 3):
        n = proxy_write_v1(out, &source, &destination) if version == 1 else proxy_write_v2(out, &source, &destination)
        if n > PROXY_V1_MAX or proxy_parse(place(f, out, n), n, &source_again, &destination_again) != <int> n:
            return FAULT_ADDRESS
        if not address_equal(&source, &source_again) or not address_equal(&destination, &destination_again):
            return FAULT_ADDRESS
    return SOUND


cdef inline bint spells(const uint8_t *at, const uint8_t *end, const text_t *words, uint32_t n) noexcept nogil:
    # Whether the words, one after the other, are all that stands there.
    cdef uint32_t i
    for i in range(n):
        if <size_t> (end - at) < words[i].length or memcmp(at, words[i].at, words[i].length) != 0:
            return False
        at += words[i].length
    return at == end


cdef int check_spiffe(fuzz_t *f) noexcept nogil:
    cdef spiffe_t id
    cdef text_t words[6]
    cdef uint8_t *at = place(f, f.work, f.length)
    cdef bint found
    memset(&id, 0, sizeof(id))
    l4_trace(True)
    found = spiffe_parse(<const char *> at, f.length, &id)
    l4_trace(False)
    f.outcomes[0 if found else 1] += 1
    if not found:
        return SOUND
    f.outcomes[2] += id.account.length != 0
    if not (
        text_lies_in(&id.whole, at, f.length) and text_lies_in(&id.trust_domain, at, f.length)
        and text_lies_in(&id.namespace, at, f.length) and text_lies_in(&id.account, at, f.length)
    ):
        return FAULT_OUTSIDE
    if id.whole.length != f.length or id.trust_domain.length == 0 or (id.account.length == 0) != (id.namespace.length == 0):
        return FAULT_GRAMMAR
    words[0].at, words[0].length = b"spiffe://", 9
    words[1] = id.trust_domain
    if not spells(at, at + 9 + id.trust_domain.length, words, 2) or at[9 + id.trust_domain.length] != 47:
        return FAULT_GRAMMAR
    if id.account.length:
        words[2].at, words[2].length = b"/ns/", 4
        words[3] = id.namespace
        words[4].at, words[4].length = b"/sa/", 4
        words[5] = id.account
        if not spells(at, at + f.length, words, 6):
            return FAULT_GRAMMAR
    return SOUND


cdef int check(fuzz_t *f) noexcept nogil:
    cdef int fault
    if f.target == TARGET_HELLO:
        fault = check_hello(f, False)
    elif f.target == TARGET_PROXY:
        fault = check_proxy(f, False)
    else:
        fault = check_spiffe(f)
    if fault == SOUND and l4_discovered:
        corpus_add(f, f.work, f.length)
        # Cut at every byte, because there is something new in it.
        if f.target == TARGET_HELLO:
            fault = check_hello(f, True)
        elif f.target == TARGET_PROXY:
            fault = check_proxy(f, True)
    return fault


cdef class Fuzzer:
    """``target``: hello, proxy or spiffe. ``corpus``: inputs of at most 4096 bytes."""

    cdef fuzz_t f

    def __cinit__(self, str target, list corpus, uint64_t seed):
        self.f.target = ("hello", "proxy", "spiffe").index(target)
        self.f.room = l4_map_guarded(ROOM)
        self.f.inputs = <uint8_t **> calloc(CORPUS_MAX, sizeof(uint8_t *))
        self.f.lengths = <uint32_t *> calloc(CORPUS_MAX, sizeof(uint32_t))
        self.f.reader = l4_reader_new()
        self.f.random = seed * <uint64_t> 0x9e3779b97f4a7c15 | 1
        if self.f.room == NULL or self.f.inputs == NULL or self.f.lengths == NULL or self.f.reader == NULL:
            raise MemoryError
        l4_forget_edges()
        for data in corpus:
            if not corpus_add(&self.f, <const uint8_t *> (<bytes> data), len(data)):
                raise ValueError("an input of the corpus is too long")

    def __dealloc__(self):
        cdef uint32_t i
        for i in range(self.f.n):
            free(self.f.inputs[i])
        free(self.f.inputs)
        free(self.f.lengths)
        SSL_CTX_free(self.f.reader)
        if self.f.room != NULL:
            l4_unmap_guarded(self.f.room, ROOM)

    def run(self, uint32_t rounds):
        """Parses so many inputs. Raises AssertionError with the first that breaks a rule."""
        cdef uint32_t _i
        cdef int fault = SOUND
        with nogil:
            for _i in range(rounds):
                mutate(&self.f)
                fault = check(&self.f)
                if fault != SOUND:
                    break
        if fault != SOUND:
            raise AssertionError(f"{FAULTS[fault]}: {bytes(self.f.work[:self.f.length]).hex()}")

    def judge(self, bytes data):
        """The rules on one input; the name of the one that it breaks, or ""."""
        if len(data) > INPUT_MAX:
            raise ValueError("the input is too long")
        memcpy(self.f.work, <const uint8_t *> data, len(data))
        self.f.length = len(data)
        return FAULTS[check(&self.f)]

    def make(self):
        """The next input, for a model in Python."""
        mutate(&self.f)
        return bytes(self.f.work[:self.f.length])

    @property
    def outcomes(self):
        """How often each came out: of hello found, partial, not TLS, invalid, found by OpenSSL as well; of proxy found, partial,
        invalid; of spiffe yes, no, with a service account."""
        return [self.f.outcomes[i] for i in range(OUTCOMES)]

    @property
    def size(self):
        """Of the corpus by now."""
        return self.f.n
