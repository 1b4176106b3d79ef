"""Certificates for tests, made with openssl: an authority, a signed server certificate, and an unrelated authority."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import attrs
import servers


@attrs.frozen
class Certificates:
    """PEM files: `authority` signed `server` (for 127.0.0.1 and localhost); `stranger` is an unrelated authority."""

    directory: Path

    @property
    def authority(self) -> Path:
        return self.directory / "authority.crt"

    @property
    def stranger(self) -> Path:
        return self.directory / "stranger.crt"

    @property
    def server(self) -> Path:
        return self.directory / "server.crt"

    @property
    def key(self) -> Path:
        return self.directory / "server.key"


def make_certificates(directory: Path, *, owner: str | None = None) -> Certificates:
    """Make the certificates in a directory. If the tests run as root, the files belong to `owner`."""
    if shutil.which("openssl") is None:
        servers.miss("openssl is not installed: apt-get install openssl")
    made = Certificates(directory)
    for name in ("authority", "stranger"):
        _openssl(directory, "req", "-x509", *_key(name), "-out", f"{name}.crt", "-days", "2", "-subj", f"/CN={name}")
    _openssl(directory, "req", *_key("server"), "-out", "server.csr", "-subj", "/CN=localhost")
    (directory / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    signed_by = ("-CA", "authority.crt", "-CAkey", "authority.key", "-CAcreateserial")
    _openssl(
        directory,
        "x509",
        "-req",
        "-in",
        "server.csr",
        *signed_by,
        "-out",
        "server.crt",
        "-days",
        "2",
        "-extfile",
        "names",
    )
    for file in directory.iterdir():
        file.chmod(0o600)
        if owner is not None and os.geteuid() == 0:
            shutil.chown(file, owner)
    if owner is not None and os.geteuid() == 0:
        shutil.chown(directory, owner)
    return made


def _key(name: str) -> tuple[str, ...]:
    return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key")


def _openssl(directory: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)
