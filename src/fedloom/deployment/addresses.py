"""Addresses as kits and commands name them: HOST:PORT, and [HOST]:PORT for a host that is an IPv6 address."""

from __future__ import annotations

import ipaddress
import re
from contextlib import suppress

from fedloom.errors import DeploymentError

HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}")
PORT = re.compile(r"[1-9][0-9]{0,4}")


def read_host(text: str, where: str = "") -> str:
    """Read a host's name or address; an IPv6 address may stand in brackets, and comes out without them.

    Raises:
        DeploymentError: it is neither.
    """
    bare = text[1:-1] if text[:1] + text[-1:] == "[]" else text
    try:
        # Behind % stands an interface of one machine, which means nothing on another.
        if ":" in bare and "%" not in bare:
            return str(ipaddress.IPv6Address(bare))
        # Whoever connects does this, and fails with another error: a part of it may be empty or too long.
        bare.encode("idna")
    except ValueError:
        bare = ""
    if bare != text or not HOST.fullmatch(bare):
        raise DeploymentError(
            "not a host name or address", where=where, mend="name one without a port, as fed.example.org or 2001:db8::1"
        )
    return bare


def join_address(host: str, port: int) -> str:
    """Return HOST:PORT, with brackets where the host has colons of its own."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(text: str, *, where: str = "", mend: str = "") -> tuple[str, int]:
    """Return the host, without brackets, and the port.

    Raises:
        DeploymentError: it is not HOST:PORT, as an IPv6 address without brackets is not.
    """
    host, _, port = text.rpartition(":")
    with suppress(DeploymentError):
        read = read_host(host)
        if PORT.fullmatch(port) and int(port) < 2**16 and (":" in read) == (host[:1] == "["):
            return read, int(port)
    raise DeploymentError(f"not HOST:PORT: {text[:80]!r}", where=where, mend=mend)
