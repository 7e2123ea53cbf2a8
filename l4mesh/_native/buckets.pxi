# Part of _fastpath: the bandwidth of workloads, which outlives plans.


cdef class Bucket:
    """What a workload may receive, or send: shared by all its connections, which keep it for as long as they live."""

    cdef bucket_t *bucket

    def __cinit__(self):
        self.bucket = <bucket_t *> memory(sizeof(bucket_t))
        self.bucket.refs = 1

    def __dealloc__(self):
        if self.bucket != NULL:
            bucket_drop(self.bucket)

    def set(self, uint64_t rate, uint64_t burst) -> None:
        """Bytes a second, and bytes that may pass at once after a pause; 0: no limit, and as few as is exact. For live connections
        as well: those that wait for their turn are given a new one."""
        bucket_change(self.bucket, rate, burst, clock_ns(CLOCK_MONOTONIC))
