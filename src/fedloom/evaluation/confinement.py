"""Program that runs another one, which a model wrote, where it can do no harm; `code_runs` starts it by its path.

Linux namespaces hold what the other could do: no network, no process but its own, and a root of its own that has the
system's libraries and Python, all read-only, and one folder in memory to write to. Limits of the kernel hold its time,
memory, processes and files; a filter keeps from it the system calls that lead around them. When its first process ends,
the kernel ends all others and forgets the folder.

It imports nothing of fedloom, so that `python -I -S` can run it. What it is to do stands on its input, in JSON; on its
output it says how far it came, a line a step.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

MOUNTS, MESSAGES, USERS, PROCESSES, NETWORK = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
BIND, RECURSIVE, PRIVATE, NO_SUID, NO_DEVICES = 0x1000, 0x4000, 0x40000, 0x2, 0x4
DETACH = 2
SET_DEATH_SIGNAL, SET_FILTER, NO_NEW_PRIVILEGES = 1, 22, 38
SET_ATTRIBUTES = 442
"""Number of the system call `mount_setattr`, everywhere; Linux has it since 5.12."""
WHOLE_TREE, READ_ONLY, HERE = 0x8000, 0x1, -100

SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/etc/ld.so.cache")
"""Parts of the system that Python needs, seen as they are and read-only."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
FOLDER = "/tmp"
"""Folder that the program is in, and the only one that it can write to."""
FILES = 10_000
"""Files and folders that it can make there: an empty one takes memory of the kernel's, and none of the folder's."""
NOBODY = 1_900_000_000
"""User that a program runs as where this one is root; with the process's number added, nobody else's."""
OURS = Path("/.program.py")
DRIVER = """
import os, sys
def run():
    token = os.read(0, 64)
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)
    answer = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    path = sys.argv.pop()
    with open(path, "rb") as file:
        program = file.read()
    os.write(answer, b"started\\n")
    exec(compile(program, "program.py", "exec"), {})
    os.write(answer, token)
run()
"""
"""Program around the program: it says that it has started, and at the end a word that the other was not told."""

libc = ctypes.CDLL(None, use_errno=True)
REFUSED = {
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "memfd_create": (319, 279),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "fsopen": (430, 430), "clone3": (435, 435),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "ptrace": (101, 117), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "memfd_secret": (447, 447),
}  # fmt: skip
"""System calls that a program does not have, with their numbers on x86-64 and on ARM: those that take memory which no
limit counts, make namespaces in which it has rights, or read the user's keys, and some that kernels had holes in. Of
`clone3` no filter can see what is asked; libraries do with `clone` where it is not there."""
CLONE, SOCKET = (56, 220), (41, 198)
FAMILIES = (1, 2, 10, 16)
"""Kinds of sockets that a program may make, which a network namespace holds: Unix, IPv4, IPv6 and netlink. Others may
reach past it, to the machine that this one runs on."""
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machines whose numbers are here: place in the tuples above, and the kernel's name."""
LOAD, IS, HAS, AT_LEAST, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
NUMBER, MACHINE, FIRST_ARGUMENT = 0, 4, 16
ALLOW, MISSING = 0x7FFF0000, 0x00050000 | 38


class ConfinementError(Exception):
    """A step that this machine does not allow."""


def call(what: str, function: Any, *arguments: Any) -> None:
    """Call the C library.

    Raises:
        ConfinementError: it refuses.
    """
    if function(*arguments) != 0:
        raise ConfinementError(f"{what}: {os.strerror(ctypes.get_errno())}")


def mount(what: str, source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """Mount something."""
    words = [word.encode() or None for word in (source, target, kind)]
    call(f"mount {what}", libc.mount, *words, ctypes.c_ulong(flags), options.encode() or None)


def make_read_only(path: str, *, whole: bool) -> None:
    """Make what is mounted at a place read-only; with `whole`, and all that is mounted below it."""
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY | NO_SUID, 0, 0, 0)
    call(
        f"make {path} read-only", libc.syscall, SET_ATTRIBUTES, HERE, path.encode(), WHOLE_TREE if whole else 0,
        ctypes.byref(attributes), ctypes.sizeof(attributes),
    )  # fmt: skip


def enter_namespaces() -> None:
    """Leave the machine's network, processes and mounts; whoever is not root becomes the owner of a namespace first."""
    user, group = os.getuid(), os.getgid()
    call("make namespaces", libc.unshare, MOUNTS | MESSAGES | PROCESSES | NETWORK | (USERS if user else 0))
    if user:
        # The user stays who it is: what is started afterwards then has none of an owner's rights.
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    mount("nothing that others see", "none", "/", flags=RECURSIVE | PRIVATE)


def build_root(root: str, python: str, program: str, folder_bytes: int) -> None:
    """Make a folder the root: system and Python read-only, and one folder in memory."""
    written = program.encode(errors="replace")
    # With room for the program, which may have a whole file of tests behind it.
    mount("a root", "none", root, "tmpfs", NO_SUID, f"mode=755,size={(1 << 20) + 2 * len(written)}")
    home = os.path.realpath(os.path.join(os.path.dirname(python), os.pardir))
    for path in (*SYSTEM, *DEVICES, home):
        place = Path(root + path)
        if not os.path.exists(path) or place.exists():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if os.path.islink(path):
            place.symlink_to(os.readlink(path))
            continue
        place.mkdir() if os.path.isdir(path) else place.touch()
        mount(path, path, str(place), flags=BIND | RECURSIVE)
        make_read_only(str(place), whole=True)
    Path(f"{root}{OURS}").write_bytes(written)
    Path(root + FOLDER).mkdir()
    mount(
        "a folder",
        "none",
        root + FOLDER,
        "tmpfs",
        NO_SUID | NO_DEVICES,
        f"mode=1777,size={folder_bytes},nr_inodes={FILES}",
    )
    make_read_only(root, whole=False)
    os.chdir(root)
    call("change the root", libc.pivot_root, b".", b".")
    call("leave the old root", libc.umount2, b".", DETACH)
    os.chdir(FOLDER)


def set_limits(limits: dict[str, int]) -> None:
    """Limit this process, and all that it starts."""
    for name, value in limits.items():
        kind = getattr(resource, name)
        most = resource.getrlimit(kind)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (value, value))


def become_nobody() -> None:
    """Give up all rights: root becomes a user that nobody else is, and no program gives any back."""
    if os.getuid() == 0:
        user = NOBODY + OUTER_PID
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    call("take no rights", libc.prctl, NO_NEW_PRIVILEGES, 1, 0, 0, 0)


def filter_calls() -> None:
    """Take the system calls from this process, and all that it starts, that lead around what holds it.

    Raises:
        ConfinementError: their numbers on this machine are not known, or the kernel has no filters.
    """
    if platform.machine() not in MACHINES:
        raise ConfinementError(f"filter system calls: their numbers on {platform.machine()} are not known")
    column, name = MACHINES[platform.machine()]
    refuse, allow = (RETURN, 0, 0, MISSING), (RETURN, 0, 0, ALLOW)
    # A step is (what, steps to skip where it holds, and where it does not, a number).
    steps = [
        (LOAD, 0, 0, MACHINE),
        (IS, 1, 0, name),
        refuse,
        (LOAD, 0, 0, NUMBER),
        (AT_LEAST, 0, 1, 0x40000000),
        refuse,
    ]
    for numbers in REFUSED.values():
        steps += [(IS, 0, 1, numbers[column]), refuse]
    steps += [(IS, 0, 4, CLONE[column]), (LOAD, 0, 0, FIRST_ARGUMENT), (HAS, 0, 1, USERS), refuse, allow]
    steps += [(IS, 0, len(FAMILIES) + 2, SOCKET[column]), (LOAD, 0, 0, FIRST_ARGUMENT)]
    steps += [(IS, len(FAMILIES) - place, 0, family) for place, family in enumerate(FAMILIES)]
    steps += [refuse, allow]
    packed = b"".join(struct.pack("HBBI", *step) for step in steps)
    code = ctypes.create_string_buffer(packed, len(packed))
    program = struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code))
    call("filter system calls", libc.prctl, SET_FILTER, 2, program, 0, 0)


def end_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends."""
    call("end with whoever asked", libc.prctl, SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def start(told: dict[str, Any]) -> int:
    """Start the program in this process's namespaces, and return its number."""
    reads, writes = os.pipe()
    os.write(writes, told["token"].encode())
    os.close(writes)
    child = os.fork()
    if child:
        os.close(reads)
        return child
    try:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.dup2(reads, 0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        set_limits(told["limits"])
        if told["confined"]:
            become_nobody()
            filter_calls()
        os.closerange(3, 1024)
        path = str(OURS) if told["confined"] else told["path"]
        os.execve(told["python"], [told["python"], "-I", "-S", "-c", DRIVER, path], {})
    finally:
        os._exit(125)


def wait_for(child: int, seconds: float) -> bool:
    """Wait for a program; return whether it ended in time."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        signal.sigtimedwait({signal.SIGCHLD}, left)
        # Orphans of the program are this process's children, and their ends wake it too.
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                if ended == child:
                    return True
    return False


def run(told: dict[str, Any]) -> None:
    """Run the program, and say on the output how far it came."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    end_with_parent()
    if told["confined"]:
        enter_namespaces()
        first = os.fork()  # the first process of the new namespace: with it, all others of it end
        if first:
            os.waitpid(first, 0)
            return
        end_with_parent()
        build_root(told["folder"], told["python"], told["program"], told["folder_bytes"])
    else:
        os.chdir(told["folder"])
        told["path"] = os.path.join(told["folder"], OURS.name)
        Path(told["path"]).write_text(told["program"], encoding="utf-8", errors="replace")
    child = start(told)
    if not wait_for(child, told["seconds"]):
        say("late")
    with suppress(ProcessLookupError):  # nobody of its group is left
        os.killpg(child, signal.SIGKILL)


def say(word: str) -> None:
    """Write a line on the output."""
    os.write(1, f"{word}\n".encode())


OUTER_PID = os.getpid()
if __name__ == "__main__":
    try:
        run(json.load(sys.stdin))
    except (ConfinementError, OSError) as error:
        say(f"not confined: {error}")
    # Not `sys.exit`: whichever process this is, there is nothing to tidy up.
    os._exit(0)
