# Leaves of the compiled data path: implementation, inlined into _fastpath.
