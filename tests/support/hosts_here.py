"""Hosts made of network namespaces: each with its own interfaces, ports, loopback and names; gone afterwards."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

NAMES = Path("/etc/netns")
"""Folder in which `ip netns exec` finds a namespace's own /etc/hosts."""


def why_no_hosts() -> str:
    """Say why no namespaces can be made here; nothing where they can."""
    if shutil.which("ip") is None:
        return "no ip command: apt install iproute2"
    name = f"fedloom-{os.getpid()}"
    if os.geteuid() != 0 or subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "network namespaces are not permitted"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


@contextmanager
def hosts(server: str, *clients: str) -> Iterator[Mapping[str, list[str]]]:
    """Make hosts, and tell what a command begins with to run on each; all know the server by its name."""
    space = {name: f"fedloom-{os.getpid()}-{index}" for index, name in enumerate((server, *clients))}
    with ExitStack() as stack:
        for index, (name, namespace) in enumerate(space.items()):
            _ip("netns", "add", namespace)
            stack.callback(_ip, "netns", "del", namespace)
            (NAMES / namespace).mkdir(parents=True)
            stack.callback(shutil.rmtree, NAMES / namespace)
            (NAMES / namespace / "hosts").write_text(f"127.0.0.1 localhost\n10.77.0.1 {server}\n")
            _ip("-n", namespace, "link", "set", "lo", "up")
            if name == server:
                _ip("-n", namespace, "link", "add", "lan", "type", "bridge")
                _address(namespace, "lan", 1)
                continue
            switch = f"to-{name}"[:15]
            _ip("-n", namespace, "link", "add", "lan", "type", "veth", "peer", "name", switch, "netns", space[server])
            _ip("-n", space[server], "link", "set", switch, "master", "lan", "up")
            _address(namespace, "lan", index + 1)
        yield {name: ["ip", "netns", "exec", namespace] for name, namespace in space.items()}


def _address(namespace: str, interface: str, number: int) -> None:
    _ip("-n", namespace, "address", "add", f"10.77.0.{number}/24", "dev", interface)
    _ip("-n", namespace, "link", "set", interface, "up")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
