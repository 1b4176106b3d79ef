"""TLS to a broker: the options of an amqps:// URL reach the driver, and the certificate must have the URL's name."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import brokers
import pytest
import servers
from certificates import Certificates, make_certificates
from consumers import running
from queues import queue_name

from contract_tests.kit import wait_until
from contract_tests.messages import message
from transports.celery import CeleryTransport
from transports.celery.transport import from_url
from unstract_core import ConfigurationError, Consumer, Dispatcher, TransportUnavailable

LISTENER = """
listeners.ssl.1 = 127.0.0.1:{port}
listeners.ssl.2 = 127.0.0.2:{port}
ssl_options.cacertfile = {made.authority}
ssl_options.certfile = {made.server}
ssl_options.keyfile = {made.key}
ssl_options.verify = verify_none
ssl_options.fail_if_no_peer_cert = false
"""


@attrs.frozen
class Encrypted:
    """A broker that speaks TLS at `port`, and what has signed its certificate."""

    port: int
    made: Certificates

    def url(self, authority: Path | None = None, host: str = "127.0.0.1", **options: Any) -> str:
        options = {"ssl_ca_certs": authority, **options} if authority else options
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"amqps://guest:guest@{host}:{self.port}//?{query}"

    def listens(self) -> bool:
        try:
            for host in ("127.0.0.1", "127.0.0.2"):
                socket.create_connection((host, self.port), timeout=1).close()
        except OSError:
            return False
        return True


@pytest.fixture(scope="module")
def encrypted() -> Iterator[Encrypted]:
    """A private RabbitMQ with a TLS listener beside its other one."""
    if not brokers.installed():
        servers.miss("no rabbitmq-server is installed to start a private one from: apt-get install rabbitmq-server")
    directory = Path(tempfile.mkdtemp(prefix="wire-mq-tls-"))
    try:
        (directory / "tls").mkdir()
        made = make_certificates(directory / "tls")
        broker = brokers.PrivateBroker(directory)
        encrypted = Encrypted(servers.free_port(), made)
        with (directory / "rabbitmq.conf").open("a") as configuration:
            configuration.write(LISTENER.format(port=encrypted.port, made=made))
        try:
            broker.start()
            wait_until(encrypted.listens, what="it to speak TLS too: those listeners open after the other one")
            yield encrypted
        finally:
            broker.remove()
    finally:
        shutil.rmtree(directory)


def works(transport: CeleryTransport, queue: str) -> None:
    """Send, receive, settle and answer: every kind of connection that there is."""
    with contextlib.closing(transport), running(Consumer(transport, {"add": lambda a, b: a + b}, [queue])):
        assert Dispatcher(transport).call("add", args=[1, 2], queue=queue, timeout=30) == 3


def test_tls_options_of_a_url_reach_the_driver(encrypted: Encrypted) -> None:
    """With the authority in the URL everything works over TLS, and the certificate must have the URL's name."""
    works(from_url(encrypted.url(encrypted.made.authority)), queue_name())
    works(from_url(encrypted.url(encrypted.made.authority, ssl_cert_reqs="required")), queue_name())


def test_tls_options_of_the_constructor_reach_the_driver(encrypted: Encrypted) -> None:
    """The options of the constructor have the same effect as those of the URL."""
    ca = str(encrypted.made.authority)
    works(CeleryTransport(encrypted.url(), ssl={"ca_certs": ca, "cert_reqs": ssl.CERT_REQUIRED}), queue_name())


def test_an_untrusted_certificate_is_refused(encrypted: Encrypted) -> None:
    """A certificate of another authority is refused by every operation, with that reason."""
    for url in (encrypted.url(encrypted.made.stranger), encrypted.url()):
        with contextlib.closing(from_url(url)) as transport:
            with pytest.raises(TransportUnavailable, match=r"(?i)certificate.verify.failed"):
                transport.send([message("t", "q")])
            with pytest.raises(TransportUnavailable, match=r"(?i)certificate.verify.failed"):
                transport.subscribe(["q"], lease=1)


@pytest.mark.parametrize("options", ["", "?ssl_cert_reqs=required"])
def test_an_upper_case_scheme_is_checked(options: str) -> None:
    """The certificate must have the URL's name for any case of the scheme."""
    for scheme in ("amqps", "AMQPS"):
        with contextlib.closing(from_url(f"{scheme}://h//{options}")) as transport:
            assert transport._settings.ssl["server_hostname"] is None


def test_a_certificate_of_another_host_is_refused(encrypted: Encrypted) -> None:
    """A certificate that is valid for another host is refused."""
    url = encrypted.url(encrypted.made.authority, ssl_server_hostname="broker.example.com")
    with (
        contextlib.closing(from_url(url)) as transport,
        pytest.raises(TransportUnavailable, match=r"(?i)certificate.verify.failed"),
    ):
        transport.send([message("t", "q")])
    other = encrypted.url(encrypted.made.authority, host="127.0.0.2")
    with contextlib.closing(from_url(other)) as transport, pytest.raises(TransportUnavailable, match="mismatch"):
        transport.send([message("t", "q")])
    works(from_url(encrypted.url(encrypted.made.authority, host="127.0.0.2", ssl_cert_reqs="none")), queue_name())


def test_disabled_checks_accept_any_certificate(encrypted: Encrypted) -> None:
    """With ssl_cert_reqs=none the connection is encrypted, and no certificate is checked."""
    works(from_url(encrypted.url(ssl_cert_reqs="none")), queue_name())


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("amqps://h//?ssl_nonsense=1", "ssl_nonsense='1' is not understood"),
        ("amqps://h//?ssl_cert_reqs=perhaps", "ssl_cert_reqs='perhaps' is not understood"),
        ("amqp://h//?ssl_ca_certs=x", "ssl_ca_certs needs amqps://"),
    ],
)
def test_an_ineffective_tls_option_is_refused(url: str, said: str) -> None:
    """A misspelt TLS option, or one without amqps://, raises ConfigurationError."""
    with pytest.raises(ConfigurationError, match=said):
        from_url(url)


def test_the_command_uses_tls_options(encrypted: Encrypted) -> None:
    """`unstract-wire` works with the right authority, and prints one line with a wrong one."""
    for authority, code in ((encrypted.made.authority, 0), (encrypted.made.stranger, 2)):
        command = [sys.executable, "-m", "unstract_core", "dead", "list", "--queue", "q", "--json"]
        ended = subprocess.run([*command, "--url", encrypted.url(authority)], capture_output=True, text=True)
        assert ended.returncode == code, ended.stderr
        assert len(ended.stderr.splitlines()) == (1 if code else 0)
