"""Health checks where the network plays tricks."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.netns

SELF = """
import select, socket, struct
from l4mesh.config.load import parse_config
from l4mesh.model import ProxyProtocol
from l4mesh.runtime.probes import Probe, Prober

# What the kernel does to whoever connects to a port that is free and its to give.
with socket.socket() as plain:
    plain.connect(("127.0.0.1", 40001))
    assert plain.getsockname() == plain.getpeername()
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
check = parse_config('''
listeners: [{name: a, bind: "127.0.0.1:1", cluster: a}]
clusters: [{name: a, endpoints: ["127.0.0.1:40001"], health_check: {}}]
''').clusters["a"].health_check
prober, said = Prober(lambda terms: None), []
prober.begin(Probe(check, "127.0.0.1", 40001, ProxyProtocol.OFF), 0.0, lambda *result: said.append(result))
while not said:
    select.select([prober], [], [], 10)
    prober.turn()
prober.begin(Probe(check, "10.9.9.9", 80, ProxyProtocol.OFF), 0.0, lambda *result: said.append(result))
# The one port that this network has is taken: that is nobody's fault but ours.
with socket.create_server(("127.0.0.1", 40001)):
    prober.begin(Probe(check, "127.0.0.1", 40001, ProxyProtocol.OFF), 0.0, lambda *result: said.append(result))
assert len(prober) == 0
print(said)
"""


def test_a_check_does_not_take_itself_for_the_endpoint_nor_its_own_want_of_ports_for_a_failure() -> None:
    ports = "net.ipv4.ip_local_port_range=40001 40001"
    command = ["unshare", "--net", "sh", "-c", f'ip link set lo up && sysctl -qw "{ports}" && exec "$0" -c "$1"', sys.executable, SELF]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    # And where there is no route, a connection would fail as well.
    seen = "[('connect: refused', ''), ('connect: unreachable', ''), (None, 'EADDRNOTAVAIL (Cannot assign requested address)')]"
    assert done.stdout.strip() == seen
