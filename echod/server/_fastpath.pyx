# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, binding=False
"""The compiled fast path for ordinary lines: receive, check, upper-case, send, count, without creating Python objects.

A chunk is ordinary if it is ASCII, ends with LF, holds no line longer than the limit, and the kernel accepts the whole
reply at once. Every other chunk is passed unchanged to the connection's Python code, which is the only place that
handles unusual lines.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_SetFromErrno
from libc.errno cimport EAGAIN, EINTR, errno
from libc.string cimport memchr, memmove

INTERFACE = 2

cdef extern from "<sys/socket.h>" nogil:
    ssize_t recv(int descriptor, void *buffer, size_t size, int flags)
    ssize_t send(int descriptor, const void *buffer, size_t size, int flags)
    int MSG_NOSIGNAL
    int SOCK_NONBLOCK, SOCK_CLOEXEC
    ctypedef unsigned int socklen_t
    cdef struct sockaddr:
        unsigned short sa_family
    int accept4(int descriptor, sockaddr *address, socklen_t *length, int flags)

cdef extern from "<netinet/in.h>" nogil:
    int AF_INET, AF_INET6
    int INET6_ADDRSTRLEN
    cdef struct in_addr:
        pass
    cdef struct in6_addr:
        pass
    cdef struct sockaddr_in:
        unsigned short sin_port
        in_addr sin_addr
    cdef struct sockaddr_in6:
        unsigned short sin6_port
        unsigned int sin6_flowinfo
        in6_addr sin6_addr
        unsigned int sin6_scope_id
    unsigned short ntohs(unsigned short number)
    unsigned int ntohl(unsigned int number)

cdef extern from "<arpa/inet.h>" nogil:
    const char *inet_ntop(int family, const void *address, char *text, socklen_t size)

cdef enum:
    CHUNK_BYTES = 65536
    # A chunk whose lines average less than this is costly for its size. The next read is smaller, so an iteration of
    # the event loop stays short however many clients send empty lines.
    SHORT_LINE_BYTES = 16
    SHORT_CHUNK_BYTES = 8192

# All connections share these buffers: only the event loop's thread uses them, and no data survives a call.
cdef unsigned char chunk[CHUNK_BYTES]
cdef unsigned char replies[CHUNK_BYTES]


cdef union Address:
    sockaddr any
    sockaddr_in ipv4
    sockaddr_in6 ipv6


def accept(int listener):
    """Accept a TCP client; return its non-blocking descriptor and its address in the format of the socket module.

    Return None if the backlog is empty. Raise OSError as socket.accept does.
    """
    cdef Address address
    cdef socklen_t length = sizeof(address)
    cdef char[64] host
    cdef int descriptor = accept4(listener, &address.any, &length, SOCK_NONBLOCK | SOCK_CLOEXEC)
    if descriptor < 0:
        if errno == EAGAIN or errno == EINTR:
            return None
        PyErr_SetFromErrno(OSError)
    if address.any.sa_family == AF_INET:
        inet_ntop(AF_INET, &address.ipv4.sin_addr, host, sizeof(host))
        return descriptor, (host.decode("ascii"), ntohs(address.ipv4.sin_port))
    inet_ntop(AF_INET6, &address.ipv6.sin6_addr, host, sizeof(host))
    return descriptor, (
        host.decode("ascii"),
        ntohs(address.ipv6.sin6_port),
        ntohl(address.ipv6.sin6_flowinfo),
        address.ipv6.sin6_scope_id,
    )


cdef inline bint is_space(unsigned char c) noexcept nogil:
    """Whether str.strip removes this ASCII character."""
    return c == 0x20 or 0x09 <= c <= 0x0D or 0x1C <= c <= 0x1F


cdef inline unsigned char upper_case(const unsigned char *source, unsigned char *target, size_t size) noexcept nogil:
    """Upper-case ASCII letters; return the OR of all bytes. Branch-free, so that the compiler can vectorize it."""
    cdef unsigned char seen = 0, c
    cdef size_t i
    for i in range(size):
        c = source[i]
        seen |= c
        target[i] = c - ((<unsigned char>(c - <unsigned char>0x61) < <unsigned char>26) << 5)
    return seen


cdef ssize_t answer(size_t size, size_t line_bytes, long long *lines) noexcept nogil:
    """Write the replies to `replies` and count the lines; return the size, or -1 if the chunk is not ordinary."""
    cdef unsigned char *start = replies
    cdef unsigned char *end = replies + size
    cdef unsigned char *target = replies
    cdef unsigned char *first
    cdef unsigned char *last
    cdef unsigned char *line_feed
    cdef long long count = 0
    if upper_case(chunk, replies, size) & 0x80:
        return -1
    while start < end:
        line_feed = <unsigned char *>memchr(start, 0x0A, end - start)
        if line_feed == NULL or <size_t>(line_feed - start) > line_bytes:
            return -1
        first, last = start, line_feed
        while first < last and is_space(first[0]):
            first += 1
        while first < last and is_space((last - 1)[0]):
            last -= 1
        if target != first:
            memmove(target, first, last - first)
        target += last - first
        target[0] = 0x0A
        target += 1
        start = line_feed + 1
        count += 1
    lines[0] = count
    return target - replies


# The work of reads in the current iteration of the event loop, and its limits: see `fastpath.limit_iteration`.
cdef size_t units = 0
cdef size_t check_units, budget_units, unit_bytes
cdef bint is_detecting_next = False


def limit_iteration(size_t check, size_t budget, size_t size):
    """See `fastpath.limit_iteration`."""
    global check_units, budget_units, unit_bytes
    check_units, budget_units, unit_bytes = check, budget, size


def begin_iteration():
    """See `fastpath.begin_iteration`."""
    global units, is_detecting_next
    units = 0
    is_detecting_next = False


cdef class HotPath:
    """The base of a connection: its counters, and the callback that the event loop calls when it is readable.

    While `is_hot` is true, ordinary chunks are answered here; while it is false, the callback only calls `_read`. A
    subclass implements `_read`, and `_receive`, `_keep_pending` and `_lose` for everything that is not ordinary;
    `_detect_iteration` and `_postpone` handle very many clients that have input at once.
    """

    cdef public int descriptor
    cdef public bint is_hot
    cdef public size_t line_bytes
    cdef public long long hot_lines
    cdef public long long bytes_in
    cdef public long long bytes_out
    cdef size_t room_bytes

    def __cinit__(self):
        self.room_bytes = CHUNK_BYTES

    def __call__(self):
        global is_detecting_next
        if units >= check_units:
            if not is_detecting_next:
                is_detecting_next = True
                self._detect_iteration()
            if units >= budget_units:
                self._postpone()
                return
        self._read_once()

    def read_now(self):
        self._read_once()

    cdef int _read_once(self) except -1:
        global units
        cdef ssize_t received, size, sent
        cdef long long lines = 0
        cdef int error
        units += 1
        if not self.is_hot:
            self._read()
            return 0
        received = recv(self.descriptor, chunk, self.room_bytes, 0)
        if received < 0:
            error = errno
            if error != EAGAIN and error != EINTR:
                self._lose(error)
            return 0
        units += received // unit_bytes
        size = answer(received, self.line_bytes, &lines) if received and chunk[received - 1] == 0x0A else -1
        if size < 0:
            self._receive(PyBytes_FromStringAndSize(<char *>chunk, received))
            return 0
        self.bytes_in += received
        self.bytes_out += size
        self.hot_lines += lines
        self.room_bytes = SHORT_CHUNK_BYTES if lines * SHORT_LINE_BYTES > received else CHUNK_BYTES
        sent = send(self.descriptor, replies, size, MSG_NOSIGNAL)
        if sent == size:
            return 0
        if sent < 0:
            error = errno
            if error != EAGAIN and error != EINTR:
                self._lose(error)
                return 0
            sent = 0
        self._keep_pending(PyBytes_FromStringAndSize(<char *>replies + sent, size - sent))
        return 0
