"""One CA for the tests of TLS, and two identities of it."""

from pathlib import Path

import pytest

from tests.support.certificates import REDIS, WEB, Authority, Files


@pytest.fixture(scope="session")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.new(tmp_path_factory.mktemp("ca") / "ca")


@pytest.fixture
def web(ca: Authority, tmp_path: Path) -> Files:
    return ca.files(tmp_path, "web", WEB)


@pytest.fixture
def redis(ca: Authority, tmp_path: Path) -> Files:
    return ca.files(tmp_path, "redis", REDIS)
