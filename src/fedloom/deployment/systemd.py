"""Units of systemd for both sides of a deployment. They hold no secrets: keys lie in the service's own folder.

Each service has a user of its own, can write its own folder alone, and gains no rights. The server's sees nothing of
the authority's key.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
import stat
import sys
from contextlib import suppress
from pathlib import Path

import fedloom
from fedloom.deployment.docker import write_files
from fedloom.errors import DeploymentError

PLAIN = re.compile(r"/[\w/.+-]+", re.ASCII)
"""Path that means the same to systemd, which replaces % and $, and splits at spaces."""
SERVICE_USER = "fedloom"
USER = """\
# Written by fedloom provision systemd, for /etc/sysusers.d: the user that both services run as.
u fedloom - "fedloom" /var/lib/fedloom
"""
UNIT = """\
After=network-online.target
Wants=network-online.target
# What ends five times within an hour wants a person: systemctl status, journalctl -u.
StartLimitIntervalSec=1h
StartLimitBurst=5

[Service]
Type=exec
User=fedloom
Group=fedloom
StateDirectory=fedloom
StateDirectoryMode=0700
WorkingDirectory=/var/lib/fedloom
Environment=HF_HOME=/var/lib/fedloom/models PYTHONDONTWRITEBYTECODE=1
"""
HARDENED = """\
Restart=on-failure
RestartSec=10
# The first signal ends it after the step that is under way, and it ends what it started; all of them get the last.
KillMode=mixed
TimeoutStopSec=60
# As it says itself that it was told to end.
SuccessExitStatus=143
UMask=0077
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
# Read, since programs and documents may lie in a home folder; PrivateDevices is left out for the sake of GPUs.
ProtectHome=read-only
PrivateTmp=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
LockPersonality=yes

[Install]
WantedBy=multi-user.target
"""
SERVE = (
    """\
# Written by fedloom provision systemd. In /var/lib/fedloom, all of the user fedloom's: fedloom-server/ (of provision
# init). It stays, and takes the runs that this user submits there (fedloom submit RECIPE), which go to runs/. Options
# may stand in /etc/fedloom/serve.env:
#   FEDLOOM_OPTIONS=--page 8080 --log-file serve.log
[Unit]
Description=fedloom's server
"""
    + UNIT
    + """\
EnvironmentFile=-/etc/fedloom/serve.env
ExecStart=PYTHON -m fedloom serve --server fedloom-server $FEDLOOM_OPTIONS
# The proxy's connections.
LimitNOFILE=32768
# It certifies servers, and is needed for provision renew alone.
InaccessiblePaths=-/var/lib/fedloom/fedloom-server/ca.key
"""
    + HARDENED
)
JOIN = (
    """\
# Written by fedloom provision systemd. In /var/lib/fedloom, all of the user fedloom's: NAME.key and NAME.kit. In
# /etc/fedloom/join-NAME.env what is this client's own, with what the server's owner reads aloud; options may lack:
#   FEDLOOM_DATA=/srv/documents
#   FEDLOOM_FINGERPRINT="3f2a 91bc ..."
#   FEDLOOM_OPTIONS=--policy policy.toml
# systemctl enable --now fedloom-join@NAME
[Unit]
Description=fedloom's client %i
"""
    + UNIT
    + """\
EnvironmentFile=/etc/fedloom/join-%i.env
ExecStart=PYTHON -m fedloom join %i.kit --data ${FEDLOOM_DATA} --fingerprint ${FEDLOOM_FINGERPRINT} $FEDLOOM_OPTIONS
"""
    + HARDENED
)
FILES = {"fedloom.conf": USER, "fedloom-serve.service": SERVE, "fedloom-join@.service": JOIN}


def write_units(folder: Path, python: Path | None = None) -> list[Path]:
    """Write the units, and the user that they want; they start the fedloom of a Python, this one if left out.

    Raises:
        DeploymentError: one of the files is there already, the folder can't be written, or the path of the Python is
            not plain.
    """
    python = python or Path(sys.executable)
    if not PLAIN.fullmatch(str(python)):
        raise DeploymentError(
            "a unit can't name this path as it is",
            where=str(python),
            mend="install fedloom in a folder whose path has letters, digits and . _ + - alone, as /opt/fedloom",
        )
    return write_files(folder, {name: text.replace("PYTHON ", f"{python} ") for name, text in FILES.items()})


def describe_closed(python: Path | None = None, user: str = SERVICE_USER) -> str:
    """Return why the user of the services could not start a Python, this one if left out; nothing where it could.

    Looked at are the Python, what its links lead to, its library and fedloom: the folders on the way to each must let
    that user in. Before that user is there, it is one of the others.
    """
    wanted = [python] if python else [Path(sys.executable), Path(os.__file__), Path(fedloom.__file__)]
    for path in wanted:
        for place in (path, path.resolve()):
            for folder in reversed(place.parents):
                if not _lets_in(folder, user):
                    return (
                        f"the services can't start here: the user {user} may not enter {folder}, in which {place} lies;"
                        " install fedloom where every user can read it, as in /opt/fedloom, and write the units with it"
                    )
    return ""


def _lets_in(folder: Path, user: str) -> bool:
    try:
        found = folder.stat()
    except OSError:  # it is not there, or not for us to see: nothing is known of it
        return True
    bit = stat.S_IXOTH
    with suppress(KeyError):
        known = pwd.getpwnam(user)
        groups = {known.pw_gid, *(group.gr_gid for group in grp.getgrall() if user in group.gr_mem)}
        if known.pw_uid in (0, found.st_uid):
            bit = stat.S_IXUSR
        elif found.st_gid in groups:
            bit = stat.S_IXGRP
    return bool(found.st_mode & bit)
