"""Transparent mode: all parties in a network namespace, where dialling a service address leads to a proxy by REDIRECT.

l4mesh brings its own rules; each peer gets one REDIRECT rule for its service address, before them. HAProxy and Envoy look up
the original destination and route by it as l4mesh does; nginx can't, and forwards without asking.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import l4mesh.capture.host
import l4mesh.capture.rules
from bench.proxies import l4mesh_config
from bench.stage import DIRECT, Machine, Stage, kind_of
from l4mesh.config.load import load_config
from l4mesh.lab import Lab

SERVICE_NETWORK = "10.96.0.0/16"
CLIENT_NETWORK = "10.201.0.0/16"


@contextmanager
def captured_stage(machine: Machine, entries: Sequence[str]) -> Iterator[Stage]:
    """Raises RuntimeError, or CommandError when the namespace or the rules can't be made."""
    destinations = {entry: f"10.96.0.{number}" for number, entry in enumerate(entries, 10) if entry != DIRECT}
    with Lab() as lab:
        host = lab.host("bench")
        host.run("ip", "link", "add", "services", "type", "veth", "peer", "name", "nowhere")
        for end in ("services", "nowhere"):
            host.run("ip", "link", "set", end, "up")
        host.run("ip", "route", "add", SERVICE_NETWORK, "dev", "services")
        # A captured connection has two entries in conntrack; kept for two minutes each, those of a whole row would fill its table.
        host.run("sysctl", "-qw", "net.netfilter.nf_conntrack_tcp_timeout_time_wait=1")
        # Any address of the network is the clients' own.
        host.run("ip", "route", "add", "local", CLIENT_NETWORK, "dev", "lo")
        with Stage(machine, entries, netns=host.namespace, destinations=destinations) as stage:
            own = [next(iter(stage.proxies[entry].services.values())) for entry in destinations if kind_of(entry) == "l4mesh"]
            if own:
                rules = machine.folder / "rules.yaml"
                named = [dataclasses.replace(service, name=f"echo-{number}") for number, service in enumerate(own)]
                rules.write_text(json.dumps(l4mesh_config(machine.folder, named)))
                l4mesh.capture.host.apply_rules(l4mesh.capture.rules.build_rules(load_config([rules])), host.namespace)
            for entry, proxy in stage.proxies.items():
                if kind_of(entry) != "l4mesh":
                    service = proxy.services["echo"]
                    match = ["-p", "tcp", "-d", service.destination, "-j", "REDIRECT", "--to-ports", str(service.port)]
                    host.run("iptables", "-t", "nat", "-I", "OUTPUT", *match)
            yield stage
