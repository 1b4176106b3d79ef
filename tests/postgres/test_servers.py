"""The servers of these tests."""

from __future__ import annotations

import psycopg
import pytest
import servers


def test_servers_have_different_major_versions(embedded_url: str, server_url: str) -> None:
    """The tests that run on both servers cover two major versions of PostgreSQL."""
    versions = []
    for url in (embedded_url, server_url):
        with psycopg.connect(url) as connection:
            versions.append(connection.info.server_version // 10_000)
    if versions[0] == versions[1] and not servers.REQUIRE_SERVICES:
        pytest.skip(f"both are PostgreSQL {versions[0]}: point UNSTRACT_WIRE_TEST_POSTGRES at another major version")
    assert versions[0] != versions[1]
