/* Loaded into a process under test: fails the n-th allocation, or the n-th system call of a kind, that l4mesh's compiled code or OpenSSL
   makes. It puts functions of its own in the places through which these libraries call the C library's, so that nobody else's calls are
   touched and a sanitizer keeps its allocator. Driven by tests/support/shortage.py through ctypes. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

enum { OWN = 1, OPENSSL = 2, SOCKET = 4, ACCEPT = 8, PIPE = 16, EPOLL = 32, CONNECT = 64, SEND = 128, BIND = 256, EVENTFD = 512,
       RECV = 1024, SPLICE = 2048 };
enum { MAX_RANGES = 16, MAX_SITES = 1 << 20, PLACES = 1 << 18 };

static struct { uintptr_t start, end, base; int kind; } ranges[MAX_RANGES];
static int n_ranges;
static unsigned armed;                     /* kinds that are counted */
static long seen, first, last;             /* calls since it was armed; those from `first` to `last` fail */
static uintptr_t only;                     /* or, if not 0, the first one from this place */
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
    else if (strncmp(name, "libssl", 6) == 0 || strncmp(name, "libcrypto", 9) == 0 || strncmp(name, "libIPSec", 8) == 0
             || strncmp(name, "libgcrypt", 9) == 0) kind = OPENSSL;
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
    uintptr_t site;
    if (kinds == 0 || (kind && !(kinds & kind))) return 0;
    range = range_of(caller);
    if (range < 0 || (kind ? ranges[range].kind != OWN : !(kinds & ranges[range].kind))) return 0;
    number = __atomic_fetch_add(&seen, 1, __ATOMIC_RELAXED);
    site = ((uintptr_t) caller - ranges[range].base) << 1 | (ranges[range].kind == OWN);
    if (number < MAX_SITES) sites[number] = site;
    if (only ? site != only : number < first || number > last) return 0;
    if (__atomic_fetch_add(&failed, 1, __ATOMIC_RELAXED) && only) { __atomic_fetch_sub(&failed, 1, __ATOMIC_RELAXED); return 0; }
    errno = error_code;
    return 1;
}

void shortage_arm(unsigned kinds, long from, long to, uintptr_t place, int error)
{
    seen = failed = 0; first = from; last = to; only = place; error_code = error;
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

static void *our_malloc(size_t size)
{
    void *block = fails(0, CALLER) ? NULL : malloc(size);
    note(block, CALLER);
    return block;
}

static void *our_calloc(size_t count, size_t size)
{
    void *block = fails(0, CALLER) ? NULL : calloc(count, size);
    note(block, CALLER);
    return block;
}

static void *our_realloc(void *before, size_t size)
{
    void *block;
    if (fails(0, CALLER)) return NULL;
    forget(before);
    block = realloc(before, size);
    note(block, CALLER);
    return block;
}

static void our_free(void *block)
{
    forget(block);
    free(block);
}

static int our_posix_memalign(void **block, size_t alignment, size_t size)
{
    int rc;
    if (fails(0, CALLER)) return ENOMEM;
    rc = posix_memalign(block, alignment, size);
    if (rc == 0) note(*block, CALLER);
    return rc;
}

static char *our_strdup(const char *text)
{
    char *copy = fails(0, CALLER) ? NULL : strdup(text);
    note(copy, CALLER);
    return copy;
}

static int our_socket(int domain, int type, int protocol) { return fails(SOCKET, CALLER) ? -1 : socket(domain, type, protocol); }

static int our_accept4(int fd, struct sockaddr *address, socklen_t *length, int flags)
{
    return fails(ACCEPT, CALLER) ? -1 : accept4(fd, address, length, flags);
}

static int our_pipe2(int *fds, int flags) { return fails(PIPE, CALLER) ? -1 : pipe2(fds, flags); }

static int our_epoll_ctl(int epoll, int operation, int fd, struct epoll_event *event)
{
    return operation == EPOLL_CTL_ADD && fails(EPOLL, CALLER) ? -1 : epoll_ctl(epoll, operation, fd, event);
}

static int our_epoll_create1(int flags) { return fails(EVENTFD, CALLER) ? -1 : epoll_create1(flags); }

static int our_eventfd(unsigned int value, int flags) { return fails(EVENTFD, CALLER) ? -1 : eventfd(value, flags); }

static int our_connect(int fd, const struct sockaddr *address, socklen_t length)
{
    return fails(CONNECT, CALLER) ? -1 : connect(fd, address, length);
}

static int our_bind(int fd, const struct sockaddr *address, socklen_t length)
{
    return fails(BIND, CALLER) ? -1 : bind(fd, address, length);
}

static ssize_t our_send(int fd, const void *data, size_t length, int flags)
{
    return fails(SEND, CALLER) ? -1 : send(fd, data, length, flags);
}

static ssize_t our_recv(int fd, void *buffer, size_t length, int flags)
{
    return fails(RECV, CALLER) ? -1 : recv(fd, buffer, length, flags);
}

static ssize_t our_splice(int in, off_t *in_at, int out, off_t *out_at, size_t length, unsigned flags)
{
    return fails(SPLICE, CALLER) ? -1 : splice(in, in_at, out, out_at, length, flags);
}

#define OURS(name) { #name, (void *) our_##name }
static const struct { const char *name; void *function; } ours[] = {
    OURS(malloc), OURS(calloc), OURS(realloc), OURS(free), OURS(posix_memalign), OURS(strdup), OURS(socket), OURS(accept4), OURS(pipe2),
    OURS(epoll_ctl), OURS(epoll_create1), OURS(eventfd), OURS(connect), OURS(bind), OURS(send),
    OURS(recv), OURS(splice),
};

static void put(uintptr_t base, const ElfW(Rela) *rela, size_t size, const ElfW(Sym) *symbols, const char *names)
{
    const uintptr_t page = (uintptr_t) sysconf(_SC_PAGESIZE);
    size_t i, j;
    for (i = 0; i < size / sizeof(*rela); i++) {
        const ElfW(Sym) *symbol = &symbols[ELF64_R_SYM(rela[i].r_info)];
        uintptr_t place = base + rela[i].r_offset;
        if (ELF64_R_SYM(rela[i].r_info) == 0 || symbol->st_shndx != SHN_UNDEF || rela[i].r_addend != 0) continue;
        for (j = 0; j < sizeof(ours) / sizeof(ours[0]); j++) {
            if (strcmp(names + symbol->st_name, ours[j].name) != 0) continue;
            mprotect((void *) (place & ~(page - 1)), page, PROT_READ | PROT_WRITE);
            *(void **) place = ours[j].function;
        }
    }
}

static int put_into(struct dl_phdr_info *info, size_t size, void *context)
{
    const ElfW(Dyn) *dynamic = NULL;
    const ElfW(Sym) *symbols = NULL;
    const ElfW(Rela) *rela = NULL, *calls = NULL;
    const char *names = NULL;
    size_t rela_size = 0, calls_size = 0;
    int i;
    (void) size; (void) context;
    for (i = 0; i < n_ranges && ranges[i].base != info->dlpi_addr; i++) ;
    if (i == n_ranges) return 0;
    for (i = 0; i < info->dlpi_phnum; i++)
        if (info->dlpi_phdr[i].p_type == PT_DYNAMIC) dynamic = (const ElfW(Dyn) *) (info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
    for (; dynamic && dynamic->d_tag != DT_NULL; dynamic++) {
        if (dynamic->d_tag == DT_SYMTAB) symbols = (const ElfW(Sym) *) dynamic->d_un.d_ptr;
        if (dynamic->d_tag == DT_STRTAB) names = (const char *) dynamic->d_un.d_ptr;
        if (dynamic->d_tag == DT_RELA) rela = (const ElfW(Rela) *) dynamic->d_un.d_ptr;
        if (dynamic->d_tag == DT_RELASZ) rela_size = dynamic->d_un.d_val;
        if (dynamic->d_tag == DT_JMPREL) calls = (const ElfW(Rela) *) dynamic->d_un.d_ptr;
        if (dynamic->d_tag == DT_PLTRELSZ) calls_size = dynamic->d_un.d_val;
    }
    if (rela) put(info->dlpi_addr, rela, rela_size, symbols, names);
    if (calls) put(info->dlpi_addr, calls, calls_size, symbols, names);
    return 0;
}

/* Call it once, when the extension is loaded and before it has allocated what it will free. */
void shortage_take_over(void)
{
    dl_iterate_phdr(add_range, NULL);
    dl_iterate_phdr(put_into, NULL);
    __atomic_store_n(&tracking, 1, __ATOMIC_RELEASE);
}
