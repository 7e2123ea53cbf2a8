"""The CA server by itself, at a moment that no client can choose."""

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest

from l4mesh.runtime.ca_server import CaServer, Refused
from tests.support.certificates import Authority


def test_a_request_that_comes_while_it_stops_is_told_so(tmp_path: Path) -> None:
    authority = Authority.new(tmp_path / "ca")
    authority.nodes_path.write_text("nodes: []\n")

    async def stop() -> None:
        server = CaServer(tmp_path / "ca", timedelta(hours=1), 1.0, 1024)
        assert await server._off_loop(len, "abc") == 3
        server._executor.shutdown()
        # Without a reason it is a mistake of ours, and no less.
        with pytest.raises(RuntimeError):
            await server._off_loop(len, "abc")
        server._stop.set()
        with pytest.raises(Refused, match="the CA stops") as refused:
            await server._off_loop(len, "abc")
        assert refused.value.status == 503

    asyncio.run(stop())
