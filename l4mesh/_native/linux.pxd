# Implementation, inlined into _fastpath: declarations of the kernel's calls and constants that the data path uses, and what errors mean.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <netinet/in.h>
    #include <netinet/tcp.h>
    #include <poll.h>
    #include <sys/epoll.h>
    #include <sys/eventfd.h>
    #include <sys/ioctl.h>
    #include <linux/sockios.h>
    #include <sys/socket.h>
    #include <sys/syscall.h>
    #include <time.h>
    #include <unistd.h>
    #ifndef IP_BIND_ADDRESS_NO_PORT
    #define IP_BIND_ADDRESS_NO_PORT 24
    #endif
    #ifndef IPV6_TRANSPARENT
    #define IPV6_TRANSPARENT 75
    #endif
    #ifndef SYS_epoll_pwait2
    #define SYS_epoll_pwait2 441
    #endif
    /* By its number: the call is younger than many a C library (glibc 2.35). */
    #define l4_epoll_pwait2(fd, events, max, left) ((int) syscall(SYS_epoll_pwait2, fd, events, max, left, NULL, 8))
    #define L4_SO_ORIGINAL_DST 80  /* <linux/netfilter_ipv4.h>, and IP6T_SO_ORIGINAL_DST alike */
    """
    int errno
    enum:
        EAGAIN, EINTR, EINPROGRESS, EINVAL, EMFILE, ENFILE, ENOBUFS, ENOMEM, ECONNABORTED, ECONNREFUSED, ECONNRESET
        EPIPE, ETIMEDOUT, EHOSTUNREACH, ENETUNREACH, EADDRNOTAVAIL, EADDRINUSE, EACCES, EPERM, EPROTO, ENOPROTOOPT
        EHOSTDOWN, ENONET, EOPNOTSUPP, ENETDOWN, ENOSYS, ENOSPC, EEXIST
        AF_INET, AF_INET6, SOCK_STREAM, SOCK_NONBLOCK, SOCK_CLOEXEC
        SOL_SOCKET, SO_LINGER, SO_ERROR, SO_KEEPALIVE, SO_MARK, SO_OOBINLINE, SO_RCVLOWAT, SO_MEMINFO, SOL_IP, SOL_IPV6, IP_TRANSPARENT
        IPV6_TRANSPARENT, IP_BIND_ADDRESS_NO_PORT, L4_SO_ORIGINAL_DST
        IPPROTO_TCP, TCP_NODELAY, TCP_INFO, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT, TCP_USER_TIMEOUT, TCP_CONGESTION
        MSG_NOSIGNAL, MSG_DONTWAIT, MSG_PEEK, SHUT_WR, SIOCINQ, SIOCOUTQ
        EPOLLIN, EPOLLOUT, EPOLLERR, EPOLLHUP, EPOLLRDHUP, EPOLLPRI, EPOLLET, EPOLL_CLOEXEC
        EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD
        EFD_NONBLOCK, EFD_CLOEXEC, POLLIN, O_CLOEXEC, O_NONBLOCK, F_SETPIPE_SZ, F_GETPIPE_SZ
        SPLICE_F_MOVE, SPLICE_F_NONBLOCK, CLOCK_MONOTONIC, CLOCK_REALTIME

    ctypedef unsigned int socklen_t
    struct sockaddr:
        unsigned short sa_family
    struct in_addr:
        uint32_t s_addr
    struct in6_addr:
        uint8_t s6_addr[16]
    struct sockaddr_in:
        unsigned short sin_family
        uint16_t sin_port
        in_addr sin_addr
    struct sockaddr_in6:
        unsigned short sin6_family
        uint16_t sin6_port
        in6_addr sin6_addr
    struct sockaddr_storage:
        unsigned short ss_family
    struct linger:
        int l_onoff
        int l_linger
    struct tcp_info:
        uint32_t tcpi_rtt
        uint32_t tcpi_total_retrans
    ctypedef union epoll_data_t:
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    struct pollfd:
        int fd
        short events
    struct timespec:
        long tv_sec
        long tv_nsec

    int accept4(int fd, sockaddr *address, socklen_t *length, int flags) noexcept nogil
    int socket(int domain, int kind, int protocol) noexcept nogil
    int connect(int fd, const sockaddr *address, socklen_t length) noexcept nogil
    int bind(int fd, const sockaddr *address, socklen_t length) noexcept nogil
    int getsockname(int fd, sockaddr *address, socklen_t *length) noexcept nogil
    int setsockopt(int fd, int level, int name, const void *value, socklen_t length) noexcept nogil
    int getsockopt(int fd, int level, int name, void *value, socklen_t *length) noexcept nogil
    ssize_t recv(int fd, void *buffer, size_t length, int flags) noexcept nogil
    ssize_t send(int fd, const void *buffer, size_t length, int flags) noexcept nogil
    ssize_t splice(int fd_in, void *off_in, int fd_out, void *off_out, size_t length, unsigned int flags) noexcept nogil
    int shutdown(int fd, int how) noexcept nogil
    int close(int fd) noexcept nogil
    int pipe2(int *fds, int flags) noexcept nogil
    int fcntl(int fd, int command, ...) noexcept nogil
    int ioctl(int fd, unsigned long request, ...) noexcept nogil
    int epoll_create1(int flags) noexcept nogil
    int epoll_ctl(int epoll_fd, int operation, int fd, epoll_event *event) noexcept nogil
    int epoll_wait(int epoll_fd, epoll_event *events, int max_events, int timeout_ms) noexcept nogil
    int l4_epoll_pwait2(int epoll_fd, epoll_event *events, int max_events, const timespec *timeout) noexcept nogil
    int poll(pollfd *fds, unsigned long count, int timeout_ms) noexcept nogil
    int eventfd(unsigned int initial, int flags) noexcept nogil
    ssize_t read(int fd, void *buffer, size_t length) noexcept nogil
    ssize_t write(int fd, const void *buffer, size_t length) noexcept nogil
    int clock_gettime(int clock, timespec *ts) noexcept nogil
    uint16_t htons(uint16_t value) noexcept nogil
    uint16_t ntohs(uint16_t value) noexcept nogil


cdef inline bint is_shortage(int error) noexcept nogil:
    # Of a call on a socket that is connected: it was not the peer.
    return error == ENOMEM or error == ENOBUFS
