"""Proxy (nginx) in front of the SuperLink: clients reach Flower's path for the fleet, and nothing that operates it."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedloom.deployment.keys import Security
from fedloom.deployment.processes import Child, tail
from fedloom.deployment.status import MOST_BODY_BYTES, SIGNATURE_PATH, STATUS_PATH
from fedloom.errors import DeploymentError

START_SECONDS = 20.0
"""Time within which nginx must listen: for two or three seconds it tries again where its port is taken."""
AGAIN_SECONDS = 0.5
"""Time between two looks at whether nginx has ended."""
CONNECTIONS = 16384
"""Connections that nginx keeps open at once, where this process may open as many files."""
CLIENTS_AT_AN_ADDRESS = 64
"""Clients that may be behind one address. Each has four requests under way at most (two parts of an adapter, a look for
messages, a heartbeat)."""
NGINX = """\
# Written by fedloom serve. Paths are relative to this folder.
daemon off;
pid nginx.pid;
{user}
error_log nginx.log;
worker_rlimit_nofile {files};
events {{ worker_connections {connections}; }}
http {{
  access_log off;
  client_body_temp_path nginx-body;
  proxy_temp_path nginx-proxy;
  fastcgi_temp_path nginx-fastcgi;
  uwsgi_temp_path nginx-uwsgi;
  scgi_temp_path nginx-scgi;
  # By address, {clients} clients: what is beyond it is told to come again (HTTP 503).
  limit_conn_zone $binary_remote_addr zone=open:10m;
  limit_req_zone $binary_remote_addr zone=asked:10m rate={rate}r/s;
  upstream superlink {{
    server 127.0.0.1:{inner};
    keepalive 32;
    # uvicorn closes after 5 s: nginx must be the first, or a question is lost on its way.
    keepalive_timeout 3s;
  }}
  server {{
    {listen}
    ssl_certificate server.crt;
    ssl_certificate_key server.key;
    ssl_protocols TLSv1.2 TLSv1.3;
    server_tokens off;
    limit_conn open {open};
    limit_req zone=asked burst={burst};
    # A handshake and a header, and the next byte of a body: who is silent for longer makes way.
    client_header_timeout 20s;
    client_body_timeout 30s;
    send_timeout 30s;
    # httpx, in Flower, lets go of a connection after 5 s: it must be the first, too.
    keepalive_timeout 20s;
    lingering_time 5s;
    lingering_timeout 2s;
    reset_timedout_connection on;
    client_max_body_size {body};
    # A slow body lies on the disk and not in the SuperLink's memory, and so does a slow reader's answer.
    client_body_buffer_size 16k;
    proxy_request_buffering on;
    proxy_max_temp_file_size {body};
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_read_timeout 300s;
    proxy_ssl_trusted_certificate ca.crt;
    proxy_ssl_verify on;
    proxy_ssl_name localhost;
    # Only what clients need. nginx resolves ".." and "%2e" in a path before it chooses.
    location /v1/fleet/ {{
      # Before a byte of the body is read.
      auth_request /signature;
      error_page 500 = @later;
      proxy_pass https://superlink;
    }}
    location = {status} {{ proxy_pass https://superlink; }}
    location = /signature {{
      internal;
      proxy_pass https://superlink{signature};
      proxy_method GET;
      proxy_pass_request_body off;
      proxy_set_header Content-Length "";
    }}
    # The SuperLink is not there, or has not read its clients' keys.
    location @later {{ return 503; }}
    location / {{ return 403; }}
  }}
}}
"""


def write_configuration(security: Security, inner: int) -> Path:
    """Write nginx's configuration, in front of a SuperLink on the port `inner`."""
    path = security.folder / "nginx.conf"
    addresses = [f"{security.port}", *([f"[::]:{security.port}"] if has_ipv6() else ())]
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # A body on the disk is a file, too.
    files = 2 * CONNECTIONS if most == resource.RLIM_INFINITY else min(2 * CONNECTIONS, most)
    text = NGINX.format(
        listen=" ".join(f"listen {address} ssl backlog=4096;" for address in addresses),
        inner=inner,
        # Of root's workers nginx makes nobody's, who can't look into this folder, where bodies of adapters lie.
        user="user root;" if os.geteuid() == 0 else "",
        files=files,
        connections=files // 2,
        clients=CLIENTS_AT_AN_ADDRESS,
        open=4 * CLIENTS_AT_AN_ADDRESS,
        rate=4 * CLIENTS_AT_AN_ADDRESS,
        burst=8 * CLIENTS_AT_AN_ADDRESS,
        body=MOST_BODY_BYTES,
        status=STATUS_PATH,
        signature=SIGNATURE_PATH,
    )
    path.write_text(text, encoding="utf-8")
    return path


def has_ipv6() -> bool:
    """Return whether this machine has IPv6 at all: where it has none, nginx would not start."""
    with suppress(OSError), socket.create_server(("::", 0), family=socket.AF_INET6):
        return True
    return False


MENDS = {
    r"bind\(\) .*Address already in use": "end what listens there (ss -ltnp shows it), or set up a server with another"
    " --port",
    r"bind\(\) .*Permission denied": "set up a server with a --port from 1024 on, or let everybody have this one:"
    " sysctl net.ipv4.ip_unprivileged_port_start=PORT",
}
"""Ways out, by the words with which nginx says what keeps it from its port."""


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
            why = tail(log)
            mend = next((MENDS[words] for words in MENDS if re.search(words, why)), "")
            raise DeploymentError(f"nginx does not start: {why}", mend=mend)
        time.sleep(0.05)


def _watch(child: Child, over: threading.Event, say: Callable[[str, str], object]) -> None:
    while not over.wait(AGAIN_SECONDS):
        if child.ended:
            say("restart", "nginx ended; starting it again")
            child.start()  # whatever is left of it is ended first: its workers would keep the port
