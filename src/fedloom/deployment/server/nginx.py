"""Proxy (nginx) in front of the SuperLink: clients reach Flower's path for the fleet, and nothing that operates it."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedloom.deployment.keys import Security
from fedloom.deployment.processes import Child, tail
from fedloom.errors import DeploymentError

START_SECONDS = 20.0
"""Time within which nginx must listen: for two or three seconds it tries again where its port is taken."""
AGAIN_SECONDS = 0.5
"""Time between two looks at whether nginx has ended."""
NGINX = """\
# Written by fedloom serve. Paths are relative to this folder.
daemon off;
pid nginx.pid;
error_log nginx.log;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path nginx-body;
  proxy_temp_path nginx-proxy;
  fastcgi_temp_path nginx-fastcgi;
  uwsgi_temp_path nginx-uwsgi;
  scgi_temp_path nginx-scgi;
  server {{
    {listen}
    ssl_certificate server.crt;
    ssl_certificate_key server.key;
    ssl_protocols TLSv1.2 TLSv1.3;
    server_tokens off;
    # Flower cuts what it sends into parts that are far smaller (FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE).
    client_max_body_size 32m;
    # Parts of a message go on as they come, instead of lying on a disk first.
    proxy_request_buffering off;
    proxy_buffering off;
    # Only what clients need. nginx resolves ".." and "%2e" in a path before it chooses.
    location /v1/fleet/ {{
      proxy_pass https://127.0.0.1:{inner};
      proxy_http_version 1.1;
      proxy_read_timeout 300s;
      proxy_ssl_trusted_certificate ca.crt;
      proxy_ssl_verify on;
      proxy_ssl_name localhost;
    }}
    location / {{ return 403; }}
  }}
}}
"""


def write_configuration(security: Security, inner: int) -> Path:
    """Write nginx's configuration, in front of a SuperLink on the port `inner`."""
    path = security.folder / "nginx.conf"
    addresses = [f"{security.port}", *([f"[::]:{security.port}"] if has_ipv6() else ())]
    listen = " ".join(f"listen {address} ssl;" for address in addresses)
    path.write_text(NGINX.format(listen=listen, inner=inner), encoding="utf-8")
    return path


def has_ipv6() -> bool:
    """Return whether this machine has IPv6 at all: where it has none, nginx would not start."""
    with suppress(OSError), socket.create_server(("::", 0), family=socket.AF_INET6):
        return True
    return False


def find_nginx() -> str | None:
    """Find the program nginx, which users other than root may not have on their path."""
    return shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


@contextmanager
def proxy(security: Security, inner: int, logs: Path, say: Callable[[str, str], object]) -> Iterator[None]:
    """Run nginx in front of the SuperLink on the port `inner`, where clients come from other machines; restart it.

    Raises:
        DeploymentError: it is not installed, or does not start.
    """
    if security.is_local:
        yield
        return
    nginx = find_nginx()
    if nginx is None:
        raise DeploymentError(
            "nginx is not installed: without it, clients would reach what operates Flower too",
            mend="install it, as with: apt install nginx",
        )
    log = logs / "nginx.log"
    # Everyone can read a command line: it says nothing of where the keys lie.
    command = [nginx, "-p", "./", "-c", write_configuration(security, inner).name]
    child = Child(command, log, {**os.environ}, folder=security.folder)
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(child, over, say), daemon=True)
    try:
        _wait(child, security.folder / "nginx.pid", log)
        watcher.start()
        yield
    finally:
        over.set()
        if watcher.ident:
            watcher.join()
        child.end()


def _wait(child: Child, pid: Path, log: Path) -> None:
    """Wait until nginx listens."""
    until = time.monotonic() + START_SECONDS
    # It writes its number when it listens. That its port answers proves nothing: something else may listen there.
    while not (pid.is_file() and pid.read_text(encoding="utf-8").strip() == str(child.pid)):
        if child.ended or time.monotonic() > until:
            raise DeploymentError(f"nginx does not start: {tail(log)}")
        time.sleep(0.05)


def _watch(child: Child, over: threading.Event, say: Callable[[str, str], object]) -> None:
    while not over.wait(AGAIN_SECONDS):
        if child.ended:
            say("restart", "nginx ended; starting it again")
            child.start()  # whatever is left of it is ended first: its workers would keep the port
