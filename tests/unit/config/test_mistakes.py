"""Mistakes and what is said about them: the whole message, with its line."""

import pytest

from l4mesh.config import schema
from l4mesh.config.load import parse_config
from l4mesh.errors import ConfigError

GOOD = """\
listeners:
  - {name: web, bind: "127.0.0.1:8080", cluster: web}
clusters:
  - {name: web, endpoints: ["127.0.0.1:9001"]}
"""


def listener(text: str) -> str:
    return GOOD.replace("cluster: web}", f"cluster: web, {text}}}", 1)


def cluster(text: str) -> str:
    return GOOD.replace('9001"]', f'9001"], {text}', 1)


def endpoint(text: str) -> str:
    return GOOD.replace('"127.0.0.1:9001"', text)


def top(text: str) -> str:
    return GOOD + text


def fetched(text: str) -> str:
    return GOOD + "ca: {address: 'ca.example:15010', identity: node}\n" + text


def known(section: type[schema.Section]) -> str:
    return ", ".join(sorted(section.model_fields))


DURATION = "must be a duration with its unit, such as 250ms, 5s, 1h or 1d"
OPTIONAL = "must be a duration with its unit, such as 250ms, 5s, 1h, 1d, or off"
RATE = "must be off or a rate from 1kB/s to 100GB/s, such as 10MiB/s; got "
ONE_FAULT = "must have one of delay, refuse, reset, black_hole, slow or stall"
ARRIVALS = "must be a rate with its unit, such as 100/s, 30/m or 10/h, or off"
CASES = [
    (top("overload: on"), "5: overload: must be a mapping of keys; got 'on'"),
    (top("overload: {memory: 90}"), "5: overload.memory: must be a share such as 50%, or off; got 90"),
    (top("overload: {memory: 120%}"), "5: overload.memory: must be between 0% and 100%; got '120%'"),
    (top("overload: {memory_limit: 1g}"), "5: overload.memory_limit: must be auto or a size with its unit, such as 512B, 64KiB or 10MB; got '1g'"),
    (top("overload: {memory_limit: 64KiB}"), "5: overload.memory_limit: must be auto or at least 1MiB; got '64KiB'"),
    (top("overload: {idle: off}"), f"5: overload.idle: {DURATION}; got 'off'"),
    (top("overload: {descriptor: 90%}"), "5: overload.descriptor: is not a known key; did you mean descriptors?"),
    (GOOD.replace("9001", "nine"), "4: clusters[0].endpoints[0]: must end in a port from 1 to 65535; got '127.0.0.1:nine'"),
    (endpoint("127.0.0.1:0"), "4: clusters[0].endpoints[0]: must end in a port from 1 to 65535; got '127.0.0.1:0'"),
    (endpoint("127.0.0.1:70000"), "4: clusters[0].endpoints[0]: must end in a port from 1 to 65535; got '127.0.0.1:70000'"),
    (endpoint("127.0.0.1"), '4: clusters[0].endpoints[0]: must be an address with a port, such as "10.0.0.1:6379" (IPv6 in brackets); got \'127.0.0.1\''),
    (endpoint("'::1:80'"), '4: clusters[0].endpoints[0]: must be an address with a port, such as "10.0.0.1:6379" (IPv6 in brackets); got \'::1:80\''),
    (endpoint("999.0.0.1:80"), "4: clusters[0].endpoints[0]: must have an IP address or a host name before the port; got '999.0.0.1'"),
    (endpoint("-bad-.example:80"), "4: clusters[0].endpoints[0]: must have an IP address or a host name before the port; got '-bad-.example'"),
    (endpoint("7"), '4: clusters[0].endpoints[0]: must be a mapping of keys; got 7'),
    (endpoint("{weight: 1}"), "4: clusters[0].endpoints[0].address: is missing"),
    (endpoint('{address: "a:1", weight: 300}'), "4: clusters[0].endpoints[0].weight: must be a whole number from 0 to 256; got 300"),
    (endpoint('{address: "a:1", weight: heavy}'), "4: clusters[0].endpoints[0].weight: must be a whole number from 0 to 256; got 'heavy'"),
    (endpoint('"a:1", "a:1"'), "4: clusters[0].endpoints[1]: a:1 is endpoint 0 already: give that one a weight instead"),
    (cluster("balance: fastest"), "4: clusters[0].balance: must be round_robin, least_connections, random, source_hash or maglev; got 'fastest'"),
    (cluster("balance: roundrobin"), "4: clusters[0].balance: must be round_robin, least_connections, random, source_hash or maglev; got 'roundrobin' (did you mean round_robin?)"),
    (cluster("connect: {timeout: 5}"), f"4: clusters[0].connect.timeout: {DURATION}; got 5"),
    (cluster("connect: {timeout: 0s}"), "4: clusters[0].connect.timeout: must be between 1ms and 366d; got '0s'"),
    (cluster("connect: {timeout: 5 s}"), f"4: clusters[0].connect.timeout: {DURATION}; got '5 s'"),
    (cluster("connect: {timeout: off}"), f"4: clusters[0].connect.timeout: {DURATION}; got 'off'"),
    (cluster("connect: {attempts: 9}"), "4: clusters[0].connect.attempts: must be a whole number from 1 to 8; got 9"),
    (cluster("connect: 5s"), "4: clusters[0].connect: must be a mapping of keys; got '5s'"),
    (cluster("conect: {}"), "4: clusters[0].conect: is not a known key; did you mean connect?"),
    (cluster("tls: {mode: mutual}"), '4: clusters[0].tls.peers: is missing: name the identities that may answer, or say "*" for any of the trust domain'),
    (cluster('tls: {peers: ["*"], resumption: once}'), "4: clusters[0].tls.resumption: must be on or off; got 'once'"),
    (listener("tls: {resumption: never}"), "2: listeners[0].tls.resumption: must be on or off; got 'never'"),
    (cluster("mirror: {}"), f"4: clusters[0].mirror: is not a known key; known here: {known(schema.ClusterSection)}"),
    (cluster("outlier_detection: 5"), "4: clusters[0].outlier_detection: must be a mapping of keys; got 5"),
    (cluster("outlier_detection: {consecutive_failure: 5}"), "4: clusters[0].outlier_detection.consecutive_failure: is not a known key; did you mean consecutive_failures?"),
    (cluster("outlier_detection: {consecutive_failures: 0}"), "4: clusters[0].outlier_detection.consecutive_failures: must be off or a whole number from 1 to 1000000; got 0"),
    (cluster("outlier_detection: {interval: off}"), f"4: clusters[0].outlier_detection.interval: {DURATION}; got 'off'"),
    (cluster("outlier_detection: {interval: 10ms}"), "4: clusters[0].outlier_detection.interval: must be at least 100ms"),
    (cluster("outlier_detection: {base_ejection: 10m}"), "4: clusters[0].outlier_detection.base_ejection: must not be longer than max_ejection"),
    (cluster("outlier_detection: {max_ejected: 0.5}"), "4: clusters[0].outlier_detection.max_ejected: must be a share such as 50%; got 0.5"),
    (cluster("outlier_detection: {max_ejected: 0%}"), "4: clusters[0].outlier_detection.max_ejected: must be above 0%: one endpoint may always be ejected; enforce: 0% ejects none and only says so"),
    (cluster("outlier_detection: {enforce: 101%}"), "4: clusters[0].outlier_detection.enforce: must be between 0% and 100%; got '101%'"),
    (cluster("outlier_detection: {probe: tcp}"), "4: clusters[0].outlier_detection.probe: must be on or off; got 'tcp'"),
    (cluster("outlier_detection: {signals: {early_resets: off}}"), "4: clusters[0].outlier_detection.signals.early_resets: is not a known key; did you mean early_reset?"),
    (cluster("outlier_detection: {signals: {early_reset: 1}}"), f"4: clusters[0].outlier_detection.signals.early_reset: {OPTIONAL}; got 1"),
    (cluster("outlier_detection: {signals: {connect_failure: off, tls_failure: off, early_reset: off, no_answer: off}}"), "4: clusters[0].outlier_detection.signals: must not all be off: nothing would ever count as a failure"),
    (cluster("outlier_detection: {consecutive_failures: off, success_rate: off}"), "4: clusters[0].outlier_detection: has every detector off: turn one on, or leave it out"),
    (cluster("outlier_detection: {success_rate: {factor: 0}}"), "4: clusters[0].outlier_detection.success_rate.factor: must be a number above 0, at most 1000; got 0"),
    (cluster("outlier_detection: {success_rate: {minimum_endpoints: 3}}"), "4: clusters[0].outlier_detection.success_rate.factor: must be below 1.41: of 3 endpoints none can be further below their mean; lower it, or raise minimum_endpoints"),
    (cluster("outlier_detection: {success_rate: {minimum_endpoints: 2}}"), "4: clusters[0].outlier_detection.success_rate.minimum_endpoints: must be a whole number from 3 to 1000000; got 2"),
    (cluster("outlier_detection: {success_rate: 90%}"), "4: clusters[0].outlier_detection.success_rate: must be a mapping of keys; got '90%'"),
    (cluster("outlier_detection: {failure_percentage: {threshold: 0%}}"), "4: clusters[0].outlier_detection.failure_percentage.threshold: must be above 0%: else every endpoint is over it"),
    (cluster("outlier_detection: {latency: {floor: off}}"), f"4: clusters[0].outlier_detection.latency.floor: {DURATION}; got 'off'"),
    (GOOD.replace("{name: web, endpoints: [\"127.0.0.1:9001\"]}", "{name: original_destination, outlier_detection: {}}").replace("cluster: web", "capture: redirect, default: original_destination"), "4: clusters[0].outlier_detection: does not go with original_destination, where there is no other endpoint to go to"),
    (GOOD.replace("{name: web, endpoints: [\"127.0.0.1:9001\"]}", "{name: original_destination, limits: {connections_per_endpoint: 2}}").replace("cluster: web", "capture: redirect, default: original_destination"), "4: clusters[0].limits.connections_per_endpoint: does not go with original_destination: its addresses are not counted"),
    (cluster("panic_threshold: half"), "4: clusters[0].panic_threshold: must be a share such as 50%, or off; got 'half'"),
    (cluster("drain: {removed: 5}"), f"4: clusters[0].drain.removed: {OPTIONAL}; got 5"),
    (top("drain: {time: soon}\n"), f"5: drain.time: {OPTIONAL}; got 'soon'"),
    (cluster("health_check: {type: udp}"), "4: clusters[0].health_check.type: must be tcp, tls, http, redis, postgresql or mysql; got 'udp'"),
    (cluster("health_check: on"), "4: clusters[0].health_check: must be a mapping of keys; got 'on'"),
    (cluster("health_check: {interval: 5}"), f"4: clusters[0].health_check.interval: {DURATION}; got 5"),
    (cluster("health_check: {fast_interval: 3s}"), "4: clusters[0].health_check.fast_interval: must not be longer than interval"),
    (cluster("health_check: {fall: 0}"), "4: clusters[0].health_check.fall: must be a whole number from 1 to 100; got 0"),
    (cluster("health_check: {initial: off}"), "4: clusters[0].health_check.initial: must be up or down; got 'off'"),
    (cluster("health_check: {port: 0}"), "4: clusters[0].health_check.port: must be a whole number from 1 to 65535; got 0"),
    (cluster("health_check: {path: /a}"), "4: clusters[0].health_check.path: goes with type http only; here it is tcp"),
    (cluster("health_check: {type: redis, user: a}"), "4: clusters[0].health_check.user: goes with type postgresql or mysql only; here it is redis"),
    (cluster("health_check: {type: mysql, user: ''}"), "4: clusters[0].health_check.user: must be the name of a user; got ''"),
    (cluster("health_check: {type: tls, tls: off}"), "4: clusters[0].health_check.tls: can't be off with type tls"),
    (cluster("health_check: {sni: a.example}"), "4: clusters[0].health_check.sni: goes with tls: on or type tls only"),
    (cluster("health_check: {send: {text: a}}"), "4: clusters[0].health_check.send: needs expect: without an answer the check sees no more than a connection"),
    (cluster("health_check: {send: PING}"), """4: clusters[0].health_check.send: must be {text: "…"} or {hex: "…"}; got 'PING'"""),
    (cluster("health_check: {expect: {text: a, hex: 61}}"), """4: clusters[0].health_check.expect: must be {text: "…"} or {hex: "…"} or {regex: "…"}; got 'a'"""),
    (cluster("health_check: {expect: {hex: abc}}"), "4: clusters[0].health_check.expect: must have pairs of hexadecimal digits; got 'abc'"),
    (cluster("health_check: {expect: {regex: '(a'}}"), "4: clusters[0].health_check.expect: must have a regular expression that RE2 understands: missing ): (a"),
    (cluster(r"health_check: {expect: {regex: '(a)\1'}}"), r"4: clusters[0].health_check.expect: must have a regular expression that RE2 understands: invalid escape sequence: \1"),
    (cluster(r'health_check: {type: http, path: "/a b\r\nX: y"}'), r"4: clusters[0].health_check.path: must be a path such as /healthz, of visible ASCII characters; got '/a b\r\nX: y'"),
    (cluster(r'health_check: {type: http, host: "a\nb"}'), r"4: clusters[0].health_check.host: must be a host name, with or without a port; got 'a\nb'"),
    (cluster("health_check: {type: http, status: [99]}"), '4: clusters[0].health_check.status[0]: must be a status from 100 to 599, or a range such as "200-399"; got 99'),
    (cluster("health_check: {type: http, status: []}"), "4: clusters[0].health_check.status: must not be empty"),
    (cluster("health_check: {type: tls}, tls: {peers: ['*']}"), "4: clusters[0].health_check: has no certificate to show: add identity under the cluster's tls, or under node"),
    (cluster("timeouts: {idle: never}"), f"4: clusters[0].timeouts.idle: {OPTIONAL}; got 'never'"),
    (cluster("timeouts: {lifetime_jitter: 120%}"), "4: clusters[0].timeouts.lifetime_jitter: must be between 0% and 100%; got '120%'"),
    (cluster("timeouts: {lifetime_jitter: 0.1}"), "4: clusters[0].timeouts.lifetime_jitter: must be a share such as 50%; got 0.1"),
    (cluster("limits: {connections: 0}"), "4: clusters[0].limits.connections: must be off or a whole number from 1 to 100000000; got 0"),
    (cluster("limits: {queue: {size: 10}}"), "4: clusters[0].limits.queue: needs a limit whose end it waits for: connections or connections_per_endpoint"),
    (cluster("limits: {connections: 5, queue: on}"), "4: clusters[0].limits.queue: must be a mapping of keys; got 'on'"),
    (cluster("limits: {connections: 5, queue: {size: 0}}"), "4: clusters[0].limits.queue.size: must be a whole number from 1 to 100000000; got 0"),
    (cluster("limits: {connections: 5, queue: {timeout: off}}"), f"4: clusters[0].limits.queue.timeout: {DURATION}; got 'off'"),
    (cluster("limits: {connections: 5, queue: {timeout: 61s}}"), "4: clusters[0].limits.queue.timeout: must be at most 1m, for which no client waits; got '61s'"),
    (cluster("limits: {connections: 5, queue: {length: 7}}"), "4: clusters[0].limits.queue.length: is not a known key; known here: size, timeout"),
    (cluster("connect: {backoff: 25}"), f"4: clusters[0].connect.backoff: {OPTIONAL}; got 25"),
    (cluster("connect: {retry_budget: 20%}"), "4: clusters[0].connect.retry_budget: must be a mapping of keys; got '20%'"),
    (cluster("connect: {retry_budget: {share: 120%}}"), "4: clusters[0].connect.retry_budget.share: must be between 0% and 100%; got '120%'"),
    (cluster("connect: {retry_budget: {minimum: -1}}"), "4: clusters[0].connect.retry_budget.minimum: must be a whole number from 0 to 100000000; got -1"),
    (listener("limits: {rate: 100}"), f"2: listeners[0].limits.rate: {ARRIVALS}; got 100"),
    (listener("limits: {rate: 100/d}"), f"2: listeners[0].limits.rate: {ARRIVALS}; got '100/d'"),
    (listener("limits: {rate: 0/s}"), "2: listeners[0].limits.rate: must be between 1/h and 1000000/s; got '0/s'"),
    (listener("limits: {rate_per_source: 2000000/s}"), "2: listeners[0].limits.rate_per_source: must be between 1/h and 1000000/s; got '2000000/s'"),
    (listener("limits: {rate_per_workload: {burst: 5}}"), "2: listeners[0].limits.rate_per_workload.rate: is missing"),
    (listener("limits: {rate_per_identity: {rate: 5/s, burst: 0}}"), "2: listeners[0].limits.rate_per_identity.burst: must be a whole number from 1 to 100000000; got 0"),
    (top("limits: {rate_per_sauce: 1/s}\n"), "5: limits.rate_per_sauce: is not a known key; did you mean rate_per_source?"),
    (top("limits: {rate: {rate: fast}}\n"), f"5: limits.rate.rate: {ARRIVALS}; got 'fast'"),
    (cluster("limits: {connections: true}"), "4: clusters[0].limits.connections: must be off or a whole number from 1 to 100000000; got true"),
    (cluster("keepalive: {idle: 500ms}"), "4: clusters[0].keepalive.idle: must be whole seconds, at most 32767s; got '500ms'"),
    (cluster("keepalive: on"), "4: clusters[0].keepalive: must be a mapping of keys; got 'on'"),
    (cluster("proxy_protocol: v3"), "4: clusters[0].proxy_protocol: must be off, v1 or v2; got 'v3'"),
    (cluster("zone_preference: maybe"), "4: clusters[0].zone_preference: must be on or off; got 'maybe'"),
    (cluster("bounded_load: 50%"), "4: clusters[0].bounded_load: must be off or between 100% and 10000%; got '50%'"),
    (cluster("bounded_load: 150%"), "4: clusters[0].bounded_load: goes with balance source_hash or maglev only; here it is least_connections"),
    (cluster("balance: maglev, slow_start: 5s"), "4: clusters[0].slow_start: does not go with balance maglev, which gives each source one endpoint"),
    (GOOD.replace("{name: web, endpoints", "{endpoints"), "4: clusters[0].name: is missing"),
    (GOOD.replace("{name: web, endpoints", '{name: "a b", endpoints'), "4: clusters[0].name: must be a name of letters, digits, '.', '_', '-' or '/'; got 'a b'"),
    (GOOD.replace("{name: web, endpoints", "{name: reject, endpoints"), "4: clusters[0].name: must not be reject: as a listener's default this word refuses connections"),
    (GOOD.replace("cluster: web", "cluster: wob"), "2: listeners[0].cluster: 'wob' is not a cluster; there are: web"),
    (listener("default: web"), "2: listeners[0].cluster: means the same as default: keep one of the two"),
    (GOOD.replace(", cluster: web", ""), "2: listeners[0]: leads nowhere: add cluster: NAME, routes, or default: original_destination"),
    (GOOD.replace("cluster: web", "default: original_destination"), "2: listeners[0].default: can't be original_destination without capture: the destination would be this listener"),
    (listener("capture: tpoxy"), "2: listeners[0].capture: must be none, redirect or tproxy; got 'tpoxy' (did you mean tproxy?)"),
    (listener("preserve_source: on"), "2: listeners[0].preserve_source: goes with capture: redirect or capture: tproxy only"),
    (listener("capture: redirect, include: {interfaces: ['eth0 -j ACCEPT']}"), "2: listeners[0].include.interfaces[0]: must be the name of an interface, or its beginning and a +; got 'eth0 -j ACCEPT'"),
    (listener("capture: redirect, exclude: {interfaces: [a-name-that-is-too-long]}"), "2: listeners[0].exclude.interfaces[0]: must be the name of an interface, or its beginning and a +; got 'a-name-that-is-too-long'"),
    (listener("capture: redirect, exclude: {users: [[web]]}"), "2: listeners[0].exclude.users[0]: must be the name or the number of a user; got a list"),
    (listener("direction: inbound"), "2: listeners[0].direction: goes with capture: redirect or capture: tproxy only"),
    (GOOD.replace("127.0.0.1:8080", "localhost:8080"), "2: listeners[0].bind[0]: must be an IP address with a port to listen on, not a name; got 'localhost:8080'"),
    (GOOD.replace('"127.0.0.1:8080"', "[]"), "2: listeners[0].bind: must not be empty"),
    (top("watchdog: 50d\n"), "5: watchdog: must be between 1ms and 7d; got '50d'"),
    (listener("user_timeout: 25d"), "2: listeners[0].user_timeout: must be between 1ms and 7d; got '25d'"),
    (listener("tls: {handshake_timeout: 50d}"), "2: listeners[0].tls.handshake_timeout: must be between 1ms and 7d; got '50d'"),
    (listener("proxy_protocol: {from: [10.0.0.1], timeout: 50d}"), "2: listeners[0].proxy_protocol.timeout: must be between 1ms and 7d; got '50d'"),
    (listener("limits: {rate: {rate: 1/h, burst: 100000000}}"), "2: listeners[0].limits.rate: must have a burst of at most 366d of its rate; got 100000000"),
    (listener("routes: [{match: {}}]"), "2: listeners[0].routes[0]: must have one of cluster or split"),
    (listener("routes: [{split: [{cluster: web, weight: 0}]}]"), "2: listeners[0].routes[0].split: must have a weight above 0"),
    (listener("routes: [{cluster: nope}]"), "2: listeners[0].routes[0].cluster: 'nope' is not a cluster; there are: web"),
    (listener("routes: [{match: {ports: [0]}, cluster: web}]"), "2: listeners[0].routes[0].match.ports[0]: must be within 1 to 65535, the smaller first; got 0"),
    (listener('routes: [{match: {ports: ["9-3"]}, cluster: web}]'), "2: listeners[0].routes[0].match.ports[0]: must be within 1 to 65535, the smaller first; got '9-3'"),
    (listener('routes: [{match: {ports: [http]}, cluster: web}]'), "2: listeners[0].routes[0].match.ports[0]: must be a port, or a range such as \"8000-8999\"; got 'http'"),
    (listener("routes: [{match: {sources: [10.0.0.1/8]}, cluster: web}]"), "2: listeners[0].routes[0].match.sources[0]: has bits set behind its prefix: write 10.0.0.0/8, or 10.0.0.1 for that address alone"),
    (listener("routes: [{match: {destinations: [home]}, cluster: web}]"), "2: listeners[0].routes[0].match.destinations[0]: must be an address or a CIDR such as 10.0.0.0/8; got 'home'"),
    (listener("proxy_protocol: {timeout: 5s}"), "2: listeners[0].proxy_protocol.from: is missing"),
    (listener("backlog: 0"), "2: listeners[0].backlog: must be a whole number from 1 to 65535; got 0"),
    (top("workers: 0\n"), "5: workers: must be auto or a whole number from 1 to 256; got 0"),
    (top("watchdog: 499ms\n"), "5: watchdog: must be off or at least 500ms; got '499ms'"),
    (top("watchdog: on\n"), "5: watchdog: must be a duration with its unit, such as 250ms, 5s, 1h, 1d, or off; got 'on'"),
    (top("redirect: {on_crash: fail}\n"), "5: redirect.on_crash: must be closed or open; got 'fail'"),
    (top("redirect: {on_crash: opne}\n"), "5: redirect.on_crash: must be closed or open; got 'opne' (did you mean open?)"),
    (top("redirect: {check_interval: 5}\n"), "5: redirect.check_interval: must be a duration with its unit, such as 250ms, 5s, 1h, 1d, or off; got 5"),
    (top("workers: many\n"), "5: workers: must be auto or a whole number from 1 to 256; got 'many'"),
    (top("splice: fast\n"), "5: splice: must be on or off; got 'fast'"),
    (top("marks: {upstream: 0x539}\n"), '5: marks.upstream: must be a mark and its mask, such as "0x539/0xfff"; got 1337'),
    (top('marks: {upstream: "010/0xff"}\n'), "5: marks.upstream: must be a mark and its mask, such as \"0x539/0xfff\"; got '010/0xff'"),
    (top('marks: {upstream: "0x1000/0xfff"}\n'), "5: marks.upstream: must be a mark other than 0 that lies within its mask; got '0x1000/0xfff'"),
    (top("upgrade: {socket: run/up.sock}\n"), "5: upgrade.socket: must be the whole path of a socket, of at most 107 bytes, or off; got 'run/up.sock'"),
    (top("upgrade: /run/up.sock\n"), "5: upgrade: must be a mapping of keys; got '/run/up.sock'"),
    (top("upgrade: {path: /run/up.sock}\n"), "5: upgrade.path: is not a known key; known here: socket"),
    (top("admin: {bind: nowhere}\n"), "5: admin.bind: must be an address with a port, such as \"127.0.0.1:8080\" (IPv6 in brackets); got 'nowhere'"),
    (
        top('marks: {returned: "0x39/0xff"}\n'),
        "5: marks: must be two marks that no packet has both of; upstream 0x539/0xfff and returned 0x39/0xff are one to their masks",
    ),
    (
        top('marks: {upstream: "0x111/0xfff"}\n'),
        "5: marks: must be two marks that no packet has both of; upstream 0x111/0xfff and returned 0x111/0xfff are one to their masks",
    ),
    (
        top('access_log: {path: ""}\n'),
        '5: access_log.path: must be a file, or "-" for standard output; to log nothing say when: never',
    ),
    (top("access_log: {when: sometimes}\n"), "5: access_log.when: must be always, errors or never; got 'sometimes'"),
    (top("limits: {connections: none}\n"), "5: limits.connections: must be auto or a whole number from 1 to 100000000; got 'none'"),
    (top("identities: [{name: a}]\n"), "5: identities[0].certificate: is missing; or give a spiffe_id alone, to get it from the CA"),
    (top("identities: [{name: a, spiffe_id: web}]\n"), "5: identities[0].spiffe_id: must be a SPIFFE ID such as spiffe://example.org/ns/shop/sa/web; got 'web'"),
    (top("identities: [{name: a, spiffe_id: 'spiffe://x.org/a'}]\n"), "5: identities[0].spiffe_id: needs the CA that it comes from: add ca: {address: …, identity: …}"),
    (fetched("identities: [{name: node, spiffe_id: 'spiffe://x.org/a', crl: crl.pem}]\n"), "6: identities[0].crl: does not go with spiffe_id, which is fetched from the CA: keep the files or that"),
    (fetched("identities: [{name: a/b, spiffe_id: 'spiffe://x.org/a'}]\n"), "6: identities[0].name: must not have a '/', nor begin with '.': with spiffe_id it names a file"),
    (fetched("identities: [{name: a, spiffe_id: 'spiffe://x.org/a'}]\n"), "5: ca.identity: 'node' is not an identity; there are: a"),
    (fetched("identities: [{name: node, certificate: a, private_key: b, trust_bundle: c}]\n"), "5: ca.identity: 'node' must have a spiffe_id instead of files: the node renews it as well"),
    (fetched("identities: [{name: node, spiffe_id: 'spiffe://x.org/a'}, {name: b, spiffe_id: 'spiffe://y.org/b'}]\n"), "6: identities[1].spiffe_id: must be of the node's trust domain, spiffe://x.org/"),
    (top("ca: {identity: node}\n"), "5: ca.address: is missing"),
    (top("ca: {address: 'ca:1'}\n"), "5: ca.identity: is missing"),
    (top("ca: {address: ca, identity: node}\n"), "5: ca.address: must be an address with a port, such as \"10.0.0.1:6379\" (IPv6 in brackets); got 'ca'"),
    (top("ca: {address: 'ca:1', identity: node, retry: 5}\n"), f"5: ca.retry: {DURATION}; got 5"),
    (top("node: {identity: a}\n"), "5: node.identity: 'a' is not an identity; there are: none"),
    (top("workloads: [{name: w, addresses: [10.0.0.256]}]\n"), "5: workloads[0].addresses[0]: must be an IP address; got '10.0.0.256'"),
    (top("workloads: [{name: w, addresses: [10.0.0.2]}, {name: x, addresses: [10.0.0.2]}]\n"), "5: workloads[1].addresses: 10.0.0.2 belongs to workload w already"),
    (top("workloads: [{name: w, addresses: [10.0.0.2]}, {name: x, addresses: ['::ffff:10.0.0.2']}]\n"), "5: workloads[1].addresses: 10.0.0.2 belongs to workload w already"),
    (top("workloads: [{name: w, addresses: ['fe80::1%eth0']}]\n"), "5: workloads[0].addresses[0]: must be an IP address; got 'fe80::1%eth0'"),
    (top("policies: [{name: p, action: allow, from: [{sources: ['fe80::%eth0/64']}]}]\n"), "5: policies[0].from[0].sources[0]: must be an address or a CIDR such as 10.0.0.0/8; got 'fe80::%eth0/64'"),
    (top("policies: [{name: p, action: permit}]\n"), "5: policies[0].action: must be allow or deny; got 'permit'"),
    (top("policies: [{name: p, action: allow, from: [{}]}]\n"), "5: policies[0].from[0]: must not be empty: leave from out to mean everybody"),
    (top("policies: [{name: p, action: allow, from: }]\n"), "5: policies[0].from: has no value: give it one, or leave the key out"),
    (listener("tls: "), "2: listeners[0].tls: has no value: give it one, or leave the key out"),
    (top("policies: [{name: p, action: deny, from: []}]\n"), "5: policies[0].from: must not be [] for deny, which would refuse nobody: leave from out to mean everybody"),
    (top("policies: [{name: p, action: deny, from: [{identities: [web]}]}]\n"), "5: policies[0].from[0].identities[0]: must begin with spiffe:// or *; got 'web'"),
    (top("policies: [{name: p, action: deny, from: [{identities: ['spiffe://a//b']}]}]\n"), "5: policies[0].from[0].identities[0]: must be a SPIFFE ID such as spiffe://example.org/ns/shop/sa/web; got 'spiffe://a//b'"),
    (top("policies: [{name: p, action: deny, from: [{identities: ['spiffe://Example.org/*']}]}]\n"), "5: policies[0].from[0].identities[0]: must be as a SPIFFE ID such as spiffe://example.org/ns/shop/sa/web begins or ends with; got 'spiffe://Example.org/*'"),
    (top("policies: [{name: p, action: deny, from: [{identities: ['*/sa/web/']}]}]\n"), "5: policies[0].from[0].identities[0]: must be as a SPIFFE ID such as spiffe://example.org/ns/shop/sa/web begins or ends with; got '*/sa/web/'"),
    (top("policies: [{name: p, action: deny, from: [{service_accounts: [web]}]}]\n"), "5: policies[0].from[0].service_accounts[0]: must be namespace/name; got 'web'"),
    (top("policies: [{name: p, action: deny}, {name: p, action: deny}]\n"), "5: policies[1].name: p stands in f already"),
    (top("tracing: {enabled: on}\n"), f"5: tracing: is not a known key; known here: {known(schema.FileSection)}"),
    (top("fault: {enabled: on}\n"), "5: fault: is not a known key; did you mean faults?"),
    (top("faults: {enabled: maybe}\n"), "5: faults.enabled: must be on or off; got 'maybe'"),
    (cluster("faults: [{share: 0%, refuse: on}]"), "4: clusters[0].faults[0].share: must be above 0%: without this fault leave its entry out"),
    (cluster("faults: [{share: 101%, refuse: on}]"), "4: clusters[0].faults[0].share: must be between 0% and 100%; got '101%'"),
    (cluster("faults: [{refuse: on}]"), "4: clusters[0].faults[0].share: is missing"),
    (cluster("faults: [{share: 5%}]"), f"4: clusters[0].faults[0]: {ONE_FAULT}; got none"),
    (cluster("faults: [{share: 5%, refuse: on, slow: 10kB/s}]"), f"4: clusters[0].faults[0]: {ONE_FAULT}; got refuse and slow"),
    (cluster("faults: [{share: 60%, refuse: on}, {share: 50%, delay: 1s}]"), "4: clusters[0].faults: must not be for more than 100% of the connections; these add up to 110%"),
    (cluster("faults: [{share: 5%, refuse: off}]"), "4: clusters[0].faults[0].refuse: must be on; got 'off': without this fault leave its entry out"),
    (cluster("faults: [{share: 5%, sources: [], refuse: on}]"), "4: clusters[0].faults[0].sources: must not be empty"),
    (cluster("faults: [{share: 5%, sources: [home], refuse: on}]"), "4: clusters[0].faults[0].sources[0]: must be an address or a CIDR such as 10.0.0.0/8; got 'home'"),
    (cluster("faults: [{share: 5%, delay: 0s}]"), "4: clusters[0].faults[0].delay: must be a duration such as 250ms, or a range such as 100ms-2s; got '0s'"),
    (cluster("faults: [{share: 5%, delay: 2s-1s}]"), "4: clusters[0].faults[0].delay: must have the shorter duration first; got '2s-1s'"),
    (cluster("faults: [{share: 5%, reset: on}]"), "4: clusters[0].faults[0].reset: must be a mapping of keys; got 'on'"),
    (cluster("faults: [{share: 5%, reset: {}}]"), "4: clusters[0].faults[0].reset.after: is missing"),
    (cluster("faults: [{share: 5%, reset: {after: 5}}]"), "4: clusters[0].faults[0].reset.after: must be a size such as 64KiB, or a duration such as 5s; got 5"),
    (cluster("faults: [{share: 5%, reset: {after: 5s, direction: to_upstream}}]"), "4: clusters[0].faults[0].reset.direction: goes with a number of bytes after which to reset only"),
    (cluster("faults: [{share: 5%, reset: {after: 5B, direction: up}}]"), "4: clusters[0].faults[0].reset.direction: must be to_upstream or to_downstream; got 'up'"),
    (cluster("faults: [{share: 5%, black_hole: off}]"), "4: clusters[0].faults[0].black_hole: must be on, or a duration with its unit, such as 250ms, 5s, 1h or 1d; got 'off'"),
    (cluster("faults: [{share: 5%, slow: 0B/s}]"), "4: clusters[0].faults[0].slow: must be a rate from 1kB/s to 100GB/s, such as 10MiB/s; got '0B/s'"),
    (cluster("faults: [{share: 5%, stall: {after: 1KiB}}]"), "4: clusters[0].faults[0].stall.for: is missing"),
    (cluster("faults: [{share: 5%, stall: {for: 1s, direction: to_upstream}}]"), "4: clusters[0].faults[0].stall.direction: goes with after only: it says whose bytes are counted"),
    (listener("routes: [{cluster: web, faults: [{share: 5%}]}]"), f"2: listeners[0].routes[0].faults[0]: {ONE_FAULT}; got none"),
    (cluster("bandwidth_per_connection: {to_upstream: 10MB}"), f"4: clusters[0].bandwidth_per_connection.to_upstream: {RATE}'10MB'"),
    (cluster("bandwidth_per_connection: {to_upstream: 999B/s}"), f"4: clusters[0].bandwidth_per_connection.to_upstream: {RATE}'999B/s'"),
    (cluster("bandwidth_per_connection: {to_downstream: 1000GB/s}"), f"4: clusters[0].bandwidth_per_connection.to_downstream: {RATE}'1000GB/s'"),
    (cluster("bandwidth_per_connection: {burst: 1MiB}"), "4: clusters[0].bandwidth_per_connection.burst: goes with a rate only"),
    (listener("bandwidth_per_connection: {to_upstream: 1MB/s, burst: 49999B}"), "2: listeners[0].bandwidth_per_connection.burst: must be auto, or at least 50000B, a twentieth of a second of the rate: less would not reach it"),
    (listener("bandwidth_per_connection: {to_upstream: 1MB/s, burst: 1}"), "2: listeners[0].bandwidth_per_connection.burst: must be auto or a size with its unit, such as 512B, 64KiB or 10MB; got 1"),
    (top("workloads: [{name: w, addresses: [10.0.0.2], bandwidth: {in: 1MB/s}}]\n"), "5: workloads[0].bandwidth.in: is not a known key; known here: burst, receive, send"),
    (top("workloads: [{name: w, addresses: [10.0.0.2], bandwidth: {send: 1MB/s, burst: 1KiB}}]\n"), "5: workloads[0].bandwidth.burst: must be auto, or at least 50000B, a twentieth of a second of the rate: less would not reach it"),
    (top("listeners: []\n"), "5: the key 'listeners' stands twice here"),
    (top("node: [\n"), "6: is not YAML: did not find expected node content"),
    (top("\tnode: {}\n"), "5: is not YAML: found character that cannot start any token"),
    (GOOD + "---\n" + GOOD, "5: must be one document: remove the ---"),
    *((top(f"workers: {tagged}\n"), " is not YAML: a value is not what its tag (!!…) says: leave the tag out")
      for tagged in ("!!bool abc", "!!int", "!!float", "!!timestamp abc")),
    ("- 1\n", "1: must be a mapping with keys such as listeners and clusters"),
    ("listeners: many\n", "1: listeners: must be a list; got 'many'"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), CASES, ids=range(len(CASES)))
def test_a_mistake_is_named_with_its_line_and_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "f")
    assert f"f:{message}" in str(caught.value).splitlines()


def test_there_are_many_cases() -> None:
    assert len({message for _, message in CASES}) >= 60


def test_all_mistakes_are_reported_together_in_order() -> None:
    text = """\
workers: none
listeners:
  - {name: web, bind: "127.0.0.1:8080", cluster: missing}
  - {name: web, bind: "127.0.0.1:8080", cluster: web}
clusters:
  - name: web
    endpoints: ["127.0.0.1:1", bad]
    connect: {timeout: 5}
  - name: web
"""
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "f")
    assert [(problem.line, problem.key) for problem in caught.value.problems] == [
        (1, "workers"),
        (3, "listeners[0].cluster"),
        (4, "listeners[1].bind"),
        (4, "listeners[1].name"),
        (7, "clusters[0].endpoints[1]"),
        (8, "clusters[0].connect.timeout"),
        (9, "clusters[1].name"),
    ]
