"""List of the clients that a server knows or knew, for programs and for people. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from fedloom.deployment.approvals import Approval, format_time, last_seen, list_approvals, list_revoked
from fedloom.deployment.fingerprints import identify_server
from fedloom.deployment.keys import describe_expiry, read_server
from fedloom.deployment.signing import make_signing_key
from fedloom.report.document import Table, to_lines

HEADER = ("name", "key", "since", "last seen (UTC)", "until", "fingerprint")


def list_server(folder: Path) -> dict[str, Any]:
    """Return a record of a server and of each client, the revoked ones last; times are UTC, or None.

    Raises:
        DeploymentError: no server is set up there, or an approval can't be read.
    """
    security = read_server(folder)
    known = list_approvals(security.folder)
    clients = [_to_record(security.folder, approval) for approval in known.values()]
    for approval in list_revoked(security.folder):
        # A client's name goes on with its next key: when it was there is told of that one.
        clients.append(_to_record(security.folder, approval, seen=approval.name not in known))
    signed = security.signing_key.exists()  # not in a folder from before questions were signed
    ca = security.ca.read_text(encoding="utf-8")
    return {
        "host": security.host,
        "port": security.port,
        "fingerprint": identify_server(ca, make_signing_key(security.signing_key)) if signed else None,
        "expires": format_time(security.expires()),
        "clients": clients,
    }


def _to_record(folder: Path, approval: Approval, *, seen: bool = True) -> dict[str, Any]:
    moments = {
        "since": approval.since,
        "seen": last_seen(folder, approval.name) if seen else None,
        "expires": approval.expires,
        "revoked": approval.revoked,
    }
    told = {key: moment and format_time(moment) for key, moment in moments.items()}
    warning = "" if approval.revoked else approval.describe_end()
    return {
        "name": approval.name,
        "state": approval.state,
        **told,
        "fingerprint": approval.fingerprint,
        "warning": warning or None,
    }


def write_lines(told: Mapping[str, Any]) -> Iterator[str]:
    """Yield what `list_server` found as lines: the server, a table of its clients, and what is to be done."""
    expiry = describe_expiry(datetime.fromisoformat(told["expires"]))
    yield f"server {told['host']}, port {told['port']}: {expiry}"
    yield f"fingerprint {told['fingerprint'] or 'none before a client is approved'}"
    yield ""
    if not told["clients"]:
        yield "no clients yet: fedloom provision approve FILE"
        return
    yield from to_lines(Table(HEADER, [_to_row(client) for client in told["clients"]], text_columns=len(HEADER)))
    endless = [client["name"] for client in told["clients"] if client["state"] == "approved" and not client["expires"]]
    lines = [client["warning"] for client in told["clients"] if client["warning"]]
    if endless:
        lines.append(
            f"{', '.join(endless)}: approved before approvals had an end, and taken until revoked; fedloom provision"
            " renew NAME gives an end"
        )
    yield from ["", *lines] if lines else []


def _to_row(client: Mapping[str, Any]) -> tuple[str, ...]:
    def day(key: str, otherwise: str) -> str:
        return client[key][:10] if client[key] else otherwise

    state = client["state"] if not client["revoked"] else f"revoked {day('revoked', '')}"
    seen = client["seen"][:16].replace("T", " ") if client["seen"] else "never" if not client["revoked"] else ""
    return client["name"], state, day("since", "unknown"), seen, day("expires", "no end"), client["fingerprint"]
