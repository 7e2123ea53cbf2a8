"""The CA and the identities of the flow tests."""

from tests.flow.conftest import ca, redis, web

__all__ = ["ca", "redis", "web"]
