# Implementation, inlined into _fastpath: the one check that compiled code may make of itself.

cdef extern from *:
    """
    #include <stdio.h>
    #include <stdlib.h>
    #ifdef L4MESH_DEBUG
    #define L4_BUG(wrong, what) \\
        do { if (wrong) { fprintf(stderr, "l4mesh bug: %s:%d: %s\\n", __FILE__, __LINE__, what); abort(); } } while (0)
    #else
    #define L4_BUG(wrong, what) ((void) 0)
    #endif
    """
    # Aborts with file and line in debug and sanitizer builds; nothing in release.
    void L4_BUG(bint wrong, const char *what) noexcept nogil
