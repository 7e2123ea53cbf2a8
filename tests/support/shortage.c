/* Preloaded into a process under test: fails the n-th allocation, or the n-th system call of a kind, that l4mesh's compiled code or
   OpenSSL makes. Whose a call is, its return address tells. Driven by tests/support/shortage.py through ctypes. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

enum { OWN = 1, OPENSSL = 2, SOCKET = 4, ACCEPT = 8, PIPE = 16, EPOLL = 32, CONNECT = 64, SEND = 128, BIND = 256, EVENTFD = 512 };
enum { MAX_RANGES = 16, MAX_SITES = 1 << 20, PLACES = 1 << 18 };

static struct { uintptr_t start, end, base; int kind; } ranges[MAX_RANGES];
static int n_ranges;
static unsigned armed;                     /* kinds that are counted */
static long seen, first, last;             /* calls since it was armed; those from `first` to `last` fail */
static long failed;
static int error_code;
static uintptr_t sites[MAX_SITES];         /* by number of the call: offset in its library */
static uintptr_t live[PLACES];             /* blocks that the extension allocated and has not freed: open addressing */
static long n_live;
static int tracking, lock;

static void take(void) { while (__atomic_exchange_n(&lock, 1, __ATOMIC_ACQUIRE)) sched_yield(); }
static void give(void) { __atomic_store_n(&lock, 0, __ATOMIC_RELEASE); }

static int add_range(struct dl_phdr_info *info, size_t size, void *context)
{
    const char *name = strrchr(info->dlpi_name, '/');
    int i, kind = 0;
    (void) size; (void) context;
    name = name ? name + 1 : info->dlpi_name;
    if (strncmp(name, "_fastpath", 9) == 0) kind = OWN;
    else if (strncmp(name, "libssl", 6) == 0 || strncmp(name, "libcrypto", 9) == 0 || strncmp(name, "libIPSec", 8) == 0) kind = OPENSSL;
    for (i = 0; kind && i < info->dlpi_phnum && n_ranges < MAX_RANGES; i++) {
        if (info->dlpi_phdr[i].p_type != PT_LOAD || !(info->dlpi_phdr[i].p_flags & PF_X)) continue;
        ranges[n_ranges].base = info->dlpi_addr;
        ranges[n_ranges].start = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
        ranges[n_ranges].end = ranges[n_ranges].start + info->dlpi_phdr[i].p_memsz;
        ranges[n_ranges++].kind = kind;
    }
    return 0;
}

static int range_of(const void *caller)
{
    uintptr_t at = (uintptr_t) caller;
    int i;
    for (i = 0; i < n_ranges; i++) if (at >= ranges[i].start && at < ranges[i].end) return i;
    return -1;
}

/* Whether this call has to fail. `kind` 0: an allocation, which is of the library that asks for it. */
static int fails(unsigned kind, const void *caller)
{
    unsigned kinds = __atomic_load_n(&armed, __ATOMIC_ACQUIRE);
    int range;
    long number;
    if (kinds == 0 || (kind && !(kinds & kind))) return 0;
    range = range_of(caller);
    if (range < 0 || (kind ? ranges[range].kind != OWN : !(kinds & ranges[range].kind))) return 0;
    number = __atomic_fetch_add(&seen, 1, __ATOMIC_RELAXED);
    if (number < MAX_SITES) sites[number] = ((uintptr_t) caller - ranges[range].base) << 1 | (ranges[range].kind == OWN);
    if (number < first || number > last) return 0;
    __atomic_fetch_add(&failed, 1, __ATOMIC_RELAXED);
    errno = error_code;
    return 1;
}

void shortage_arm(unsigned kinds, long from, long to, int error)
{
    if (n_ranges == 0) dl_iterate_phdr(add_range, NULL);
    seen = failed = 0; first = from; last = to; error_code = error;
    __atomic_store_n(&armed, kinds, __ATOMIC_RELEASE);
}

long shortage_disarm(long *failures)
{
    __atomic_store_n(&armed, 0, __ATOMIC_RELEASE);
    *failures = failed;
    return seen;
}

uintptr_t shortage_site(long number) { return number < MAX_SITES ? sites[number] : 0; }

/* -- blocks that are not freed ------------------------------------------------------------------------------------------------ */

void shortage_track(void)
{
    if (n_ranges == 0) dl_iterate_phdr(add_range, NULL);
    __atomic_store_n(&tracking, 1, __ATOMIC_RELEASE);
}

long shortage_live(void) { return __atomic_load_n(&n_live, __ATOMIC_RELAXED); }

static size_t place_of(uintptr_t block) { return (block * 0x9e3779b97f4a7c15u) >> 46; }

static void note(void *block, const void *caller)
{
    size_t at;
    int range;
    if (block == NULL || !__atomic_load_n(&tracking, __ATOMIC_ACQUIRE)) return;
    range = range_of(caller);
    if (range < 0 || ranges[range].kind != OWN) return;
    take();
    for (at = place_of((uintptr_t) block); live[at]; at = (at + 1) % PLACES) ;
    live[at] = (uintptr_t) block;
    n_live++;
    give();
}

static void forget(void *block)
{
    size_t at, hole, home;
    if (block == NULL || !__atomic_load_n(&tracking, __ATOMIC_ACQUIRE) || __atomic_load_n(&n_live, __ATOMIC_RELAXED) == 0) return;
    take();
    for (at = place_of((uintptr_t) block); live[at] && live[at] != (uintptr_t) block; at = (at + 1) % PLACES) ;
    if (live[at]) {
        n_live--;
        for (hole = at; live[at = (at + 1) % PLACES]; ) {
            home = place_of(live[at]);
            if ((at - home) % PLACES >= (at - hole) % PLACES) { live[hole] = live[at]; hole = at; }
        }
        live[hole] = 0;
    }
    give();
}

/* -- what is put in the place of the C library's -------------------------------------------------------------------------------- */

#define CALLER __builtin_return_address(0)

/* dlsym allocates before the real functions are known. */
static char early[1 << 16];
static size_t early_used;

static int is_early(const void *block) { return (const char *) block >= early && (const char *) block < early + sizeof(early); }

static void *early_take(size_t size)
{
    char *block = early + early_used;
    early_used += (size + 31) & ~(size_t) 15;
    if (early_used > sizeof(early)) abort();
    return block;
}

#define NEXT(name) \
    static __typeof__(name) *next_##name; \
    static __typeof__(name) *real_##name(void) \
    { \
        static __thread int looking; \
        if (!next_##name && !looking) { looking = 1; next_##name = (__typeof__(name) *) dlsym(RTLD_NEXT, #name); looking = 0; } \
        return next_##name; \
    }

NEXT(malloc)
NEXT(calloc)
NEXT(realloc)
NEXT(free)
NEXT(posix_memalign)
NEXT(strdup)
NEXT(socket)
NEXT(accept4)
NEXT(pipe2)
NEXT(epoll_ctl)
NEXT(epoll_create1)
NEXT(eventfd)
NEXT(connect)
NEXT(bind)
NEXT(send)

void *malloc(size_t size)
{
    void *block;
    if (!real_malloc()) return early_take(size);
    block = fails(0, CALLER) ? NULL : next_malloc(size);
    note(block, CALLER);
    return block;
}

void *calloc(size_t count, size_t size)
{
    void *block;
    if (!real_calloc()) return early_take(count * size);
    block = fails(0, CALLER) ? NULL : next_calloc(count, size);
    note(block, CALLER);
    return block;
}

void *realloc(void *before, size_t size)
{
    void *block;
    if (is_early(before) || !real_realloc()) {
        block = malloc(size);
        if (block && before) memcpy(block, before, size);
        return block;
    }
    if (fails(0, CALLER)) return NULL;
    forget(before);
    block = next_realloc(before, size);
    note(block, CALLER);
    return block;
}

void free(void *block)
{
    if (block == NULL || is_early(block)) return;
    forget(block);
    real_free()(block);
}

int posix_memalign(void **block, size_t alignment, size_t size)
{
    int rc;
    if (fails(0, CALLER)) return ENOMEM;
    rc = real_posix_memalign()(block, alignment, size);
    if (rc == 0) note(*block, CALLER);
    return rc;
}

char *strdup(const char *text)
{
    char *copy = fails(0, CALLER) ? NULL : real_strdup()(text);
    note(copy, CALLER);
    return copy;
}

int socket(int domain, int type, int protocol)
{
    return fails(SOCKET, CALLER) ? -1 : real_socket()(domain, type, protocol);
}

int accept4(int fd, struct sockaddr *address, socklen_t *length, int flags)
{
    return fails(ACCEPT, CALLER) ? -1 : real_accept4()(fd, address, length, flags);
}

int pipe2(int fds[2], int flags) { return fails(PIPE, CALLER) ? -1 : real_pipe2()(fds, flags); }

int epoll_ctl(int epoll, int operation, int fd, struct epoll_event *event)
{
    return operation == EPOLL_CTL_ADD && fails(EPOLL, CALLER) ? -1 : real_epoll_ctl()(epoll, operation, fd, event);
}

int epoll_create1(int flags) { return fails(EVENTFD, CALLER) ? -1 : real_epoll_create1()(flags); }

int eventfd(unsigned int value, int flags) { return fails(EVENTFD, CALLER) ? -1 : real_eventfd()(value, flags); }

int connect(int fd, const struct sockaddr *address, socklen_t length)
{
    return fails(CONNECT, CALLER) ? -1 : real_connect()(fd, address, length);
}

int bind(int fd, const struct sockaddr *address, socklen_t length)
{
    return fails(BIND, CALLER) ? -1 : real_bind()(fd, address, length);
}

ssize_t send(int fd, const void *data, size_t length, int flags)
{
    return fails(SEND, CALLER) ? -1 : real_send()(fd, data, length, flags);
}
