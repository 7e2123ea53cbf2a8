import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.mesh import Config, Mesh
from tests.support.proxies import missing_proxies

# The sanitizers' runtime is for this process, which has it by now, and for l4mesh; the other programs run as they are.
SANITIZERS = os.environ.pop("LD_PRELOAD", "")
os.environ["L4MESH_PRELOAD"] = SANITIZERS
IN_CI = os.environ.get("CI") == "true"


def skip_or_fail(reason: str) -> None:
    """What can't run here is said; where everything must run, it is a failure."""
    if IN_CI:
        pytest.fail(reason)
    pytest.skip(reason)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("netns"):
        if os.geteuid() != 0 or not shutil.which("iptables-restore") or not shutil.which("ip"):
            skip_or_fail("needs root, iproute2 and iptables")
        if subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode:
            skip_or_fail("needs network namespaces")
    if item.get_closest_marker("peers") and missing_proxies():
        skip_or_fail(f"needs {', '.join(missing_proxies())}")


class Factory:
    """Starts processes that are checked and stopped at the end of the test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.stack = ExitStack()
        self._count = 0

    def __call__(self, config: Config, prefix: tuple[str, ...] = (), nofile: int = 0, options: tuple[str, ...] = ()) -> Mesh:
        self._count += 1
        folder = self._folder / f"mesh{self._count}"
        folder.mkdir()
        return self.stack.enter_context(Mesh(folder, config, prefix, nofile, options))


@pytest.fixture
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Factory]:
    # Short: a unix socket's path has room for 107 bytes.
    factory = Factory(tmp_path_factory.mktemp("m"))
    with factory.stack:
        yield factory
