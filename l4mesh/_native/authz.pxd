# Implementation, inlined into _fastpath: may this peer connect to this workload?
#
# Semantics of Istio's AuthorizationPolicy at layer 4 (ztunnel, src/rbac.rs): any DENY that matches refuses; else, with no ALLOW policy
# for the workload, it passes; else one ALLOW must match. A policy is a list of clauses, one of which must match; a clause
# is a conjunction of fields; a field is a list of values, one of which must match; `not_` fields must not match.
#
# The policies that apply to a workload form a set, which workloads share. Each clause of a set is filed in one hash table under its
# most selective field: an identity (whole, by prefix, by suffix), a service account, a namespace, a source prefix, a port.
# A check looks up what this connection could be filed under, one probe for each kind and each length in use, and evaluates only what
# it finds. A collision costs an evaluation, never a wrong answer.

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from l4mesh._native.address cimport address_t, mix64
from l4mesh._native.route cimport ports_hold, prefixes_hold
from l4mesh._native.spiffe cimport fnv, fnv_add, fnv_start, pattern_matches, spiffe_t, text_equal, text_t
from l4mesh._native.types cimport (
    ACTION_DENY, FILED_ACCOUNT, FILED_IDENTITY, FILED_NAMESPACE, FILED_PORT, FILED_PREFIX, FILED_SOURCE, FILED_SUFFIX,
    clause_t, filing_t, plan_t, policy_set_t, span_t, verdict_t,
)


cdef inline uint64_t filing_key(int kind, uint64_t hash, uint32_t length, uint32_t port) noexcept nogil:
    return mix64(hash + (<uint64_t> kind << 56) + (<uint64_t> length << 32) + port)


cdef inline uint64_t masked_hash(const uint8_t *ip, uint32_t bits) noexcept nogil:
    cdef uint64_t hash = fnv_start()
    cdef uint32_t i
    for i in range(bits >> 3):
        hash = fnv_add(hash, ip[i])
    if bits & 7:
        hash = fnv_add(hash, ip[bits >> 3] & <uint8_t> (0xff00 >> (bits & 7)))
    return hash


cdef inline bint span_has_text(const plan_t *plan, span_t span, const text_t *text) noexcept nogil:
    cdef uint32_t i
    for i in range(span.start, span.end):
        if pattern_matches(&plan.patterns[i], plan.text, text):
            return True
    return False


cdef inline bint span_has_account(const plan_t *plan, span_t span, const spiffe_t *peer) noexcept nogil:
    # "NAMESPACE/ACCOUNT": both parts of the pattern's text against the parts of the identity.
    cdef uint32_t i
    cdef text_t both
    if peer.account.length == 0:
        return False
    # Between the two stands "/sa/" in the identity, so that they are compared in two steps.
    for i in range(span.start, span.end):
        if plan.patterns[i].length != peer.namespace.length + 1 + peer.account.length:
            continue
        both.at = plan.text + plan.patterns[i].offset
        both.length = peer.namespace.length
        if not text_equal(&both, peer.namespace.at, peer.namespace.length) or both.at[both.length] != 47:
            continue
        both.at += both.length + 1
        both.length = peer.account.length
        if text_equal(&both, peer.account.at, peer.account.length):
            return True
    return False


cdef inline bint is_set(span_t span) noexcept nogil:
    return span.start != span.end


cdef inline bint clause_matches(
    const plan_t *plan, const clause_t *clause, const spiffe_t *peer, const address_t *source, uint16_t port
) noexcept nogil:
    if is_set(clause.ports) and not ports_hold(plan, clause.ports, port):
        return False
    if is_set(clause.not_ports) and ports_hold(plan, clause.not_ports, port):
        return False
    if is_set(clause.identities) and not span_has_text(plan, clause.identities, &peer.whole):
        return False
    if is_set(clause.not_identities) and span_has_text(plan, clause.not_identities, &peer.whole):
        return False
    if is_set(clause.namespaces) and not span_has_text(plan, clause.namespaces, &peer.namespace):
        return False
    if is_set(clause.not_namespaces) and span_has_text(plan, clause.not_namespaces, &peer.namespace):
        return False
    if is_set(clause.accounts) and not span_has_account(plan, clause.accounts, peer):
        return False
    if is_set(clause.not_accounts) and span_has_account(plan, clause.not_accounts, peer):
        return False
    if is_set(clause.sources) and not prefixes_hold(plan, clause.sources.start, clause.sources.end, source.ip):
        return False
    return not (is_set(clause.not_sources) and prefixes_hold(plan, clause.not_sources.start, clause.not_sources.end, source.ip))


cdef inline void verdict_consider(
    const plan_t *plan, int32_t index, const spiffe_t *peer, const address_t *source, uint16_t port, verdict_t *verdict
) noexcept nogil:
    # The lowest clause of each kind is kept, so that the answer does not depend on the order of probes.
    cdef const clause_t *clause = &plan.clauses[index]
    cdef int32_t *kept
    if clause.dry_run:
        kept = &verdict.dry_deny if clause.action == ACTION_DENY else &verdict.dry_allow
    else:
        kept = &verdict.deny if clause.action == ACTION_DENY else &verdict.allow
    if kept[0] >= 0 and kept[0] <= index:
        return
    if clause_matches(plan, clause, peer, source, port):
        kept[0] = index


cdef inline void verdict_probe(
    const plan_t *plan, const policy_set_t *policies, uint64_t key, const spiffe_t *peer, const address_t *source, uint16_t port,
    verdict_t *verdict,
) noexcept nogil:
    cdef uint32_t at = <uint32_t> key & policies.mask
    cdef const filing_t *filing
    cdef uint32_t next
    while True:
        filing = &plan.filings[policies.filings + at]
        if filing.clause == 0:
            return
        if filing.key == key:
            break
        at = (at + 1) & policies.mask
    next = filing.clause
    while next:
        verdict_consider(plan, <int32_t> plan.filed[next - 1].clause, peer, source, port, verdict)
        next = plan.filed[next - 1].next


cdef inline void verdict_probe_ports(
    const plan_t *plan, const policy_set_t *policies, int kind, uint64_t hash, uint32_t length, const spiffe_t *peer,
    const address_t *source, uint16_t port, verdict_t *verdict,
) noexcept nogil:
    if policies.kinds & (<uint32_t> 1 << kind) == 0:
        return
    verdict_probe(plan, policies, filing_key(kind, hash, length, port), peer, source, port, verdict)
    verdict_probe(plan, policies, filing_key(kind, hash, length, 0), peer, source, port, verdict)


cdef inline void verdict_find(
    const plan_t *plan, const policy_set_t *policies, const spiffe_t *peer, const address_t *source, uint16_t port,
    verdict_t *verdict,
) noexcept nogil:
    # All that decides about this connection. An empty `peer.whole` is a peer without an identity.
    cdef uint32_t i, length, done = 0
    cdef uint64_t hash
    cdef const text_t *whole = &peer.whole
    verdict.deny = -1
    verdict.allow = -1
    verdict.dry_deny = -1
    verdict.dry_allow = -1
    for i in range(policies.wide.start, policies.wide.end):
        verdict_consider(plan, <int32_t> plan.wide_clauses[i], peer, source, port, verdict)
    if policies.mask == 0:
        return
    verdict_probe_ports(plan, policies, FILED_PORT, 0, 0, peer, source, port, verdict)
    for i in range(policies.source_bits.start, policies.source_bits.end):
        length = plan.lengths[i]
        verdict_probe_ports(plan, policies, FILED_SOURCE, masked_hash(source.ip, length), length, peer, source, port, verdict)
    if whole.length == 0:
        return
    hash = fnv_start()
    for i in range(policies.prefix_lengths.start, policies.prefix_lengths.end):
        length = plan.lengths[i]
        if length > whole.length:
            break
        while done < length:
            hash = fnv_add(hash, <uint8_t> whole.at[done])
            done += 1
        verdict_probe_ports(plan, policies, FILED_PREFIX, hash, length, peer, source, port, verdict)
    hash = fnv_start()
    done = 0
    for i in range(policies.suffix_lengths.start, policies.suffix_lengths.end):
        length = plan.lengths[i]
        if length > whole.length:
            break
        while done < length:
            hash = fnv_add(hash, <uint8_t> whole.at[whole.length - 1 - done])
            done += 1
        verdict_probe_ports(plan, policies, FILED_SUFFIX, hash, length, peer, source, port, verdict)
    if policies.kinds & (1 << FILED_IDENTITY):
        verdict_probe_ports(plan, policies, FILED_IDENTITY, fnv(whole.at, whole.length), 0, peer, source, port, verdict)
    if peer.namespace.length:
        hash = fnv(peer.namespace.at, peer.namespace.length)
        verdict_probe_ports(plan, policies, FILED_NAMESPACE, hash, 0, peer, source, port, verdict)
        hash = fnv_add(hash, 47)
        for i in range(peer.account.length):
            hash = fnv_add(hash, <uint8_t> peer.account.at[i])
        verdict_probe_ports(plan, policies, FILED_ACCOUNT, hash, 0, peer, source, port, verdict)


cdef inline bint verdict_allows(const policy_set_t *policies, const verdict_t *verdict) noexcept nogil:
    return verdict.deny < 0 and (not policies.has_allow or verdict.allow >= 0)


cdef inline bint verdict_would_allow(const policy_set_t *policies, const verdict_t *verdict) noexcept nogil:
    # As if the dry-run policies were in force.
    if verdict.deny >= 0 or verdict.dry_deny >= 0:
        return False
    return not (policies.has_allow or policies.has_dry_allow) or verdict.allow >= 0 or verdict.dry_allow >= 0
