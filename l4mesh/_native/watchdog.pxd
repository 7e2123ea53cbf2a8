# Implementation, inlined into _fastpath: what a thread says that it is doing, and the watchdog that holds it to that.
#
# A worker writes one word before it waits and one before each thing it serves; nothing else of this runs on it. The watchdog is a thread
# of its own that never takes the GIL, so that no other thread can keep it from its work. It looks a few times within the limit. A
# thread is stuck that has something to do and has not come round for as long, where what counts is
#
# * of a thread that could run, the CPU time that it got: one that waits for a CPU is not stuck, the machine is;
# * of a thread that is blocked, the time, unless it reads pages back in; none of a process that is stopped (SIGSTOP);
# * nothing between two looks of which the second came late: the process or the machine was paused, or has no CPU to spare.
#
# HAProxy's watchdog (src/wdt.c) looks at CPU time alone and so misses blocked threads.

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset, strrchr

from l4mesh._native.address cimport address_is_v4, address_t
from l4mesh._native.atomic cimport load, load_u, store_u
from l4mesh._native.linux cimport AF_INET, AF_INET6, CLOCK_MONOTONIC, O_CLOEXEC, clock_gettime, close, read, timespec, write
from l4mesh._native.slab cimport conn_at
from l4mesh._native.types cimport (
    CONN_CHUNK, CONN_DIALLING, CONN_HANDSHAKE, CONN_HELLO, CONN_PREFACE, CONN_RELAYING, CONN_RESETTING, conn_t, engine_t, worker_t,
)

cdef extern from *:
    """
    #include <arpa/inet.h>
    #include <poll.h>
    #include <pthread.h>
    #include <signal.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <time.h>
    #ifdef __GLIBC__
    #include <execinfo.h>
    #else
    #define backtrace(frames, size) 0
    #define backtrace_symbols_fd(frames, size, fd) ((void) 0)
    #endif
    #define l4_thread_id() ((long) syscall(SYS_gettid))
    #define l4_signal_thread(tid, number) ((int) syscall(SYS_tgkill, getpid(), (int) (tid), number))
    #define L4_STACK_SIGNAL (SIGRTMIN + 5)
    """
    struct pollfd:
        int fd
        short events
        short revents
    struct tm:
        int tm_sec
    ctypedef struct sigset_t:
        pass
    enum: POLLIN, SIG_UNBLOCK, CLOCK_REALTIME, _SC_CLK_TCK, O_RDONLY
    int L4_STACK_SIGNAL
    int poll(pollfd *fds, unsigned long count, int timeout_ms) noexcept nogil
    int open_file "open"(const char *path, int flags) noexcept nogil
    int format "snprintf"(char *out, size_t size, const char *text, ...) noexcept nogil
    int scan "sscanf"(const char *text, const char *pattern, ...) noexcept nogil
    const char *inet_ntop(int family, const void *ip, char *text, unsigned int size) noexcept nogil
    tm *gmtime_r(const long *seconds, tm *out) noexcept nogil
    size_t strftime(char *out, size_t size, const char *pattern, const tm *time) noexcept nogil
    long sysconf(int name) noexcept nogil
    long l4_thread_id() noexcept nogil
    int l4_signal_thread(int64_t tid, int number) noexcept nogil
    int sigemptyset(sigset_t *set) noexcept nogil
    int sigaddset(sigset_t *set, int number) noexcept nogil
    int pthread_sigmask(int how, const sigset_t *set, sigset_t *before) noexcept nogil
    void *signal(int number, void (*handler)(int) noexcept nogil) noexcept nogil
    int backtrace(void **frames, int size) noexcept nogil
    void backtrace_symbols_fd(void **frames, int size, int fd) noexcept nogil
    unsigned int alarm(unsigned int seconds) noexcept nogil
    void abort() noexcept nogil

cdef enum doing_t:
    DOING_WAIT             # in epoll_wait; about: when it comes back at the latest, ms, 0: when something happens
    DOING_TURN             # has come back
    DOING_ADOPT            # goes over to a new plan
    DOING_ACCEPT           # about: index of the armed listener; each connection counts as coming round
    DOING_EVENT            # from here on, about: slot of the connection
    DOING_READY
    DOING_HELD
    DOING_HANDSHAKE
    DOING_TIMER
    DOING_LANE             # whose source's turn it is
    DOING_LINE             # that waited for an endpoint
    DOING_SWEEP            # looks at live connections again
    DOING_PAGE             # answers the control loop
    DOING_END              # ends what is left, about: slot; each of them counts as coming round

cdef enum:
    ABOUT_BITS = 56
    LOOKS = 8              # within the limit
    LOOP_PATIENCE = 10     # limits that the control loop gets: traffic does not wait for it
    LAST_WORDS_S = 10      # what saying it may take, with a log that blocks
    STACK_ANSWER_MS = 200

ctypedef struct thread_t:
    # The kernel's view of a thread.
    char state             # as in /proc: R S D T t Z
    uint64_t cpu_ms
    uint64_t faults        # that had to wait for a disk

ctypedef struct watched_t:
    # What the watchdog remembers of one thread between two looks.
    uint64_t turn
    thread_t thread
    uint64_t stuck_ms


# -- what a worker writes ----------------------------------------------------------------------------------------------------

cdef inline void doing(worker_t *worker, int what, uint64_t about) noexcept nogil:
    store_u(&worker.doing, <uint64_t> what << ABOUT_BITS | about)


cdef inline void watch_allow_stack() noexcept nogil:
    # The one signal that a worker takes, and it comes only with the end: to write the thread's own call stack.
    cdef sigset_t one
    sigemptyset(&one)
    sigaddset(&one, L4_STACK_SIGNAL)
    pthread_sigmask(SIG_UNBLOCK, &one, NULL)


# -- judging -----------------------------------------------------------------------------------------------------------------

cdef inline bint watch_look(
    watched_t *watched, bint busy, uint64_t turn, const thread_t *thread, uint32_t step_ms, bint late
) noexcept nogil:
    # One look at a thread. `turn` changes whenever it comes round; `thread` is zeroed unless it is busy: figures count from the first
    # look at which it was. True: it has not come round since the look before, and `stuck_ms` may have grown.
    cdef uint64_t ran_ms
    if not busy or turn != watched.turn:
        watched.turn = turn
        watched.stuck_ms = 0
        watched.thread = thread[0]
        return False
    if watched.thread.state and not late:
        ran_ms = thread.cpu_ms - watched.thread.cpu_ms
        if thread.state == c'R':
            watched.stuck_ms += ran_ms if ran_ms < step_ms else step_ms
        elif thread.state != c'T' and thread.faults == watched.thread.faults:
            watched.stuck_ms += step_ms
    watched.thread = thread[0]
    return True


cdef inline bint worker_is_busy(const worker_t *worker, uint64_t word, uint64_t now_ms) noexcept nogil:
    # Whether it has something to do: it is at it, or it waits although events are there or the time has come.
    cdef uint64_t until_ms = word & ((<uint64_t> 1 << ABOUT_BITS) - 1)
    cdef pollfd waits
    if word >> ABOUT_BITS != DOING_WAIT or (until_ms and until_ms < now_ms):
        return True
    waits.fd = worker.epoll_fd
    waits.events = POLLIN
    return poll(&waits, 1, 0) > 0


# -- what the kernel knows ---------------------------------------------------------------------------------------------------

cdef inline int watch_read(int64_t tid, const char *name, char *out, int size) noexcept nogil:
    # A file of /proc about the thread, terminated; its length, 0 when it can't be read.
    cdef char path[64]
    cdef int fd, n
    out[0] = 0
    format(path, sizeof(path), "/proc/self/task/%ld/%s", <long> tid, name)
    fd = open_file(path, O_RDONLY | O_CLOEXEC)
    if fd < 0:
        return 0
    n = <int> read(fd, out, size - 1)
    close(fd)
    if n <= 0:
        return 0
    out[n] = 0
    return n


cdef inline bint watch_parse(const char *stat, thread_t *thread) noexcept nogil:
    # Reads /proc/self/task/TID/stat (proc(5)). A thread's name, which may hold anything, is in parentheses.
    cdef unsigned long faults = 0, user = 0, system = 0
    cdef const char *rest = strrchr(stat, c')')
    if rest == NULL or scan(rest, ") %c %*d %*d %*d %*d %*d %*u %*u %*u %lu %*u %lu %lu", &thread.state, &faults, &user, &system) != 4:
        return False
    thread.faults = faults
    thread.cpu_ms = (user + system) * 1000 // <unsigned long> sysconf(_SC_CLK_TCK)
    return True


cdef inline bint watch_thread(int64_t tid, thread_t *thread) noexcept nogil:
    cdef char stat[1024]
    memset(thread, 0, sizeof(thread_t))
    return watch_read(tid, "stat", stat, sizeof(stat)) != 0 and watch_parse(stat, thread)


# -- the last words ----------------------------------------------------------------------------------------------------------

cdef inline void watch_one_line(char *text) noexcept nogil:
    # Fit to stand in quotes.
    cdef char *c = text
    while c[0]:
        if c[0] == c'\n' and c[1] == 0:
            c[0] = 0
            break
        if <uint8_t> c[0] < 32 or c[0] == c'"' or c[0] == c'\\':
            c[0] = c' '
        c += 1


cdef inline const char *watch_address(const address_t *address, char *out) noexcept nogil:
    # `out` holds 64 bytes.
    cdef char ip[64]
    if address_is_v4(address):
        inet_ntop(AF_INET, &address.ip[12], ip, sizeof(ip))
        format(out, 64, "%.45s:%d", ip, <int> address.port)
    else:
        inet_ntop(AF_INET6, address.ip, ip, sizeof(ip))
        format(out, 64, "[%.45s]:%d", ip, <int> address.port)
    return out


cdef inline const char *doing_name(uint64_t word) noexcept nogil:
    cdef uint64_t what = word >> ABOUT_BITS
    if what == DOING_WAIT: return "waiting"
    if what == DOING_ADOPT: return "adopting a plan"
    if what == DOING_ACCEPT: return "accepting"
    if what == DOING_EVENT: return "serving an event"
    if what == DOING_READY: return "going on with a stream"
    if what == DOING_HELD: return "going on with a held stream"
    if what == DOING_HANDSHAKE: return "going on with a handshake"
    if what == DOING_TIMER: return "serving a timer"
    if what == DOING_LANE: return "serving a source in its turn"
    if what == DOING_LINE: return "serving one that waited for an endpoint"
    if what == DOING_SWEEP: return "looking at live connections again"
    if what == DOING_PAGE: return "listing connections"
    if what == DOING_END: return "ending connections"
    return "beginning a turn"


cdef inline const char *state_name(int state) noexcept nogil:
    if state == CONN_PREFACE: return "preface"
    if state == CONN_HELLO: return "hello"
    if state == CONN_HANDSHAKE: return "handshake"
    if state == CONN_DIALLING: return "dialling"
    if state == CONN_RELAYING: return "relaying"
    if state == CONN_RESETTING: return "resetting"
    return "free"


cdef inline int watch_connection(const worker_t *worker, uint64_t word, char *out, int size) noexcept nogil:
    # The connection that it is about, as fields of a line. Its memory stays where it is, and nobody but the stuck worker writes it.
    cdef uint64_t what = word >> ABOUT_BITS
    cdef uint32_t slot = <uint32_t> word
    cdef const conn_t *conn
    cdef const char *listener = ""
    cdef const char *cluster = ""
    cdef char source[64]
    cdef char destination[64]
    cdef char endpoint[64]
    out[0] = 0
    if what < DOING_EVENT or what in (DOING_SWEEP, DOING_PAGE) or slot // CONN_CHUNK >= worker.n_chunks:
        return 0
    conn = conn_at(worker, slot)
    if conn.listener_stat != NULL:
        listener = conn.listener_stat.name
    if conn.cluster_stat != NULL:
        cluster = conn.cluster_stat.name
    return format(
        out, size,
        '"connection": "%u.%u.%u", "state": "%s", "listener": "%s", "cluster": "%s", "source": "%s", "destination": "%s", '
        '"endpoint": "%s", ',
        worker.index, slot, conn.generation, state_name(conn.state), listener, cluster,
        watch_address(&conn.source, source), watch_address(&conn.destination, destination), watch_address(&conn.endpoint, endpoint),
    )


cdef inline void watch_say(const char *event, int64_t tid, const char *fields, const watched_t *watched) noexcept nogil:
    # One line of the log.
    cdef char line[4096]
    cdef char wchan[128]
    cdef char call[256]
    cdef char when[32]
    cdef timespec now
    cdef tm parts
    cdef int n
    if not watch_read(tid, "wchan", wchan, sizeof(wchan)) or (wchan[0] == c'0' and wchan[1] == 0):
        wchan[0] = 0
    watch_read(tid, "syscall", call, sizeof(call))
    watch_one_line(wchan)
    watch_one_line(call)
    clock_gettime(CLOCK_REALTIME, &now)
    gmtime_r(&now.tv_sec, &parts)
    strftime(when, sizeof(when), "%Y-%m-%dT%H:%M:%S", &parts)
    n = format(
        line, sizeof(line),
        '{%s"thread": %ld, "stuck_ms": %lu, "thread_state": "%c", "thread_cpu_ms": %lu, "kernel_wait": "%s", "system_call": "%s", '
        '"event": "%s", "level": "critical", "time": "%s.%06ldZ"}\n',
        fields, <long> tid, <unsigned long> watched.stuck_ms, watched.thread.state, <unsigned long> watched.thread.cpu_ms,
        wchan, call, event, when, now.tv_nsec // 1000,
    )
    write(2, line, n if n < <int> sizeof(line) else <int> sizeof(line) - 1)


cdef inline void watch_show_stack(int number) noexcept nogil:
    # Signal handler, on the thread in question. What backtrace loads, it has loaded when the watchdog began.
    cdef void *frames[64]
    cdef int n = backtrace(frames, 64)
    write(2, b"stack of the stuck thread, innermost first:\n", 44)
    backtrace_symbols_fd(frames, n, 2)


cdef inline void watch_end(int64_t tid) noexcept nogil:
    # What else can be had of the thread, then the end of the process. Python's handler of SIGABRT adds the stacks of its threads.
    cdef char stack[4096]
    cdef int n = watch_read(tid, "stack", stack, sizeof(stack))
    if n:
        write(2, b"in the kernel:\n", 15)
        write(2, stack, n)
    l4_signal_thread(tid, L4_STACK_SIGNAL)
    poll(NULL, 0, STACK_ANSWER_MS)
    abort()


# -- the thread --------------------------------------------------------------------------------------------------------------

cdef inline bint watch_worker(worker_t *worker, watched_t *watched, uint64_t now_ms, uint32_t step_ms, bint late) noexcept nogil:
    # True when nothing has changed since the look before although there is something to do.
    cdef thread_t thread
    cdef int64_t tid = load(&worker.tid)
    cdef uint64_t word = load_u(&worker.doing)
    cdef uint64_t turn = load_u(&worker.turns) + load_u(&worker.accepted)
    cdef bint busy = tid != 0 and worker_is_busy(worker, word, now_ms)
    if word >> ABOUT_BITS == DOING_END:
        turn += word
    memset(&thread, 0, sizeof(thread))
    return watch_look(watched, busy and watch_thread(tid, &thread), turn, &thread, step_ms, late)


cdef inline void watch(engine_t *engine, worker_t **workers, watched_t *watched, uint32_t limit_ms, int stacks_signal) noexcept nogil:
    # Until `watch_fd` is written. `watched`: one for each worker, and one for the control loop.
    cdef uint32_t step_ms = limit_ms // LOOKS
    cdef uint64_t now_ms, before_ms, word, beats
    cdef watched_t *loop = &watched[engine.n_workers]
    cdef void *frames[1]
    cdef char fields[1024]
    cdef thread_t thread
    cdef timespec now
    cdef pollfd stop
    cdef bint late
    cdef bint said = False
    cdef int n
    cdef uint32_t i
    backtrace(frames, 1)
    signal(L4_STACK_SIGNAL, watch_show_stack)
    clock_gettime(CLOCK_MONOTONIC, &now)
    before_ms = <uint64_t> now.tv_sec * 1000 + <uint64_t> now.tv_nsec // 1000000
    stop.fd = engine.watch_fd
    stop.events = POLLIN
    while poll(&stop, 1, step_ms) == 0:
        clock_gettime(CLOCK_MONOTONIC, &now)
        now_ms = <uint64_t> now.tv_sec * 1000 + <uint64_t> now.tv_nsec // 1000000
        late = now_ms - before_ms > 2 * step_ms
        before_ms = now_ms
        for i in range(engine.n_workers):
            if not watch_worker(workers[i], &watched[i], now_ms, step_ms, late):
                continue
            # A step less than the limit: it may have been stuck since just after the look before the first that counts.
            if watched[i].stuck_ms + step_ms > limit_ms - step_ms // 2:
                alarm(LAST_WORDS_S)
                word = load_u(&workers[i].doing)
                n = format(
                    fields, sizeof(fields), '"worker": %u, "doing": "%s", "turn": %lu, ', i, doing_name(word),
                    <unsigned long> load_u(&workers[i].turns),
                )
                watch_connection(workers[i], word, fields + n, <int> sizeof(fields) - n)
                watch_say("worker_stuck", load(&workers[i].tid), fields, &watched[i])
                watch_end(load(&workers[i].tid))
        beats = load_u(&engine.beats)
        memset(&thread, 0, sizeof(thread))
        if not watch_look(loop, beats != 0 and watch_thread(engine.loop_tid, &thread), beats, &thread, step_ms, late):
            said = False
        elif loop.stuck_ms + step_ms > LOOP_PATIENCE * limit_ms - step_ms // 2:
            alarm(LAST_WORDS_S)
            watch_say("control_loop_stuck", engine.loop_tid, '"means": "the process ends", ', loop)
            watch_end(engine.loop_tid)
        elif not said and loop.stuck_ms + step_ms > limit_ms - step_ms // 2:
            said = True
            watch_say("control_loop_stuck", engine.loop_tid, '"means": "traffic goes on, under the plan that is in force", ', loop)
            l4_signal_thread(engine.loop_tid, stacks_signal)
