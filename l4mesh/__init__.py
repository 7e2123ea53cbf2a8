"""l4mesh: a service-mesh data plane for TCP, one process a node.

The words, one for each thing (in code, configuration, metrics and docs):

========== =================================================================================
listener   a bound socket with a capture mode and routes
route      from (original destination, source, port) to a cluster, or to several with weights
cluster    a named set of endpoints with its balancing, limits and timeouts
endpoint   one address that can be dialled
plan       all of that compiled into flat immutable tables: one generation
engine     the compiled data path; a *worker* is one of its threads
connection a *downstream* and an *upstream* socket; a *half* is one direction of it
========== =================================================================================

A connection's life, all of it in ``_fastpath.pyx``, top to bottom::

    accept → original destination → self-call? → admit → route → pick endpoint
           → dial (failed? another endpoint) → relay copy ⇄ splice → close with one reason → record

Python decides per configuration and per second; Cython indexes per connection and per byte. Imports run one way:
``cli → runtime → datapath → (policy | config | capture) → model → errors``.
"""

__version__ = "0.1.0"
