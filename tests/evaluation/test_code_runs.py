"""Programs that try to get out of where they are run, and the share of problems that k tries would solve."""

import json
import math
import os
import platform
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.confined import need_confinement
from support.marks import first

from fedloom.errors import RunError
from fedloom.evaluation import code_runs
from fedloom.evaluation.code_runs import Limits, pass_at_k, run_program, run_programs

SHORT = Limits(seconds=5.0)
BOTH = first([True, False])


@pytest.fixture(scope="module", autouse=True)
def confines() -> None:
    """Tests of what is held need a machine that can hold it."""
    need_confinement()


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have fresh folders made where a test can look at them."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def refused(line: str) -> str:
    """A program that passes where a line of it fails as by a system that refuses it."""
    return (
        f"import os, socket\ntry:\n    {line}\nexcept OSError:\n    pass\nelse:\n    raise AssertionError('it got out')"
    )


@pytest.mark.parametrize("confined", BOTH)
def test_a_program_passes_where_it_comes_to_its_end(confined: bool, own_folder: Path) -> None:
    outcomes = {
        "assert sorted([3, 1, 2]) == [1, 2, 3]": "passed",
        "assert sorted([3, 1, 2]) == [3, 1, 2]": "failed",
        "def f(:": "failed",
        "raise SystemExit(0)": "failed",
        "import os; os._exit(0)": "failed",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": "failed",
        "print('passed'); import sys; sys.stderr.write('x'); import os; os.write(3, b'passed')": "passed",
        "input()": "failed",
        "open('own.txt', 'w').write('é'); assert open('own.txt').read() == 'é'": "passed",
        "import hashlib, sqlite3, decimal, threading, tempfile; tempfile.TemporaryFile().write(b'x')": "passed",
        "s = '\ud800'": "passed",  # half a character, which a tokenizer of bytes may write
        "while True: pass": "late",
        "import time; time.sleep(60)": "late",
    }
    found = run_programs(list(outcomes), Limits(seconds=2.0), confined=confined, at_once=4)
    assert dict(zip(outcomes, found, strict=True)) == outcomes
    assert not list(own_folder.iterdir()), "folders are gone"


def test_a_program_of_megabytes_is_one_too() -> None:
    """Tests may bring their data; it is no sign of a machine that can't confine."""
    assert run_program(f"data = '{'x' * (3 << 20)}'\nassert len(data) == 3 << 20", SHORT) == "passed"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        yield listening


@pytest.mark.parametrize("confined", [True, False])
def test_no_network(confined: bool, listener: socket.socket) -> None:
    """Unconfined, the same program is at the door: what holds it is the confinement."""
    program = refused(f"socket.create_connection(('127.0.0.1', {listener.getsockname()[1]}))")
    assert run_program(program, SHORT, confined=confined) == ("passed" if confined else "failed")
    if confined:
        with pytest.raises(TimeoutError):
            listener.accept()
    else:
        listener.accept()[0].close()


@pytest.mark.parametrize("confined", [True, False])
def test_nothing_outside_the_folder_is_read_or_written(confined: bool) -> None:
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder:
        Path(folder).chmod(0o777)
        secret = Path(folder, "secret.txt")
        secret.write_text("private")
        held = "passed" if confined else "failed"
        programs = [
            refused(f"open({str(secret)!r})"),
            refused(f"open({str(Path(folder, 'new.txt'))!r}, 'w')"),
            refused(f"os.listdir({folder!r})"),
        ]
        assert run_programs(programs, SHORT, confined=confined) == [held] * 3
        assert Path(folder, "new.txt").exists() is not confined


def test_no_place_but_the_folder_can_be_written_to() -> None:
    program = """
import os, sys
places = {"/", "/usr", "/usr/bin", "/etc", "/dev", sys.prefix, os.path.dirname(os.__file__)}
for path, folders, files in os.walk("/"):
    places.add(path)
    if path.count("/") > 3:
        folders.clear()
for place in places - {"/tmp"}:
    try:
        open(os.path.join(place, "x"), "w")
    except OSError:
        continue
    raise AssertionError(place)
for tool in (sys.executable, os.__file__, "/.program.py"):
    try:
        open(tool, "r+")
    except OSError:
        continue
    raise AssertionError(tool)
assert not os.path.exists("/proc/1") and not os.path.exists("/sys/kernel")
"""
    assert run_program(program, SHORT) == "passed"


@pytest.mark.parametrize("confined", BOTH)
def test_the_environment_is_empty(confined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLOOM_TEST_SECRET", "hunter2")
    # Python sets this one by itself where it finds no language.
    assert run_program("import os; assert set(os.environ) <= {'LC_CTYPE'}", confined=confined) == "passed"


@pytest.mark.parametrize("confined", [True, False])
def test_the_environment_of_others_is_out_of_reach(confined: bool) -> None:
    program = f"""
import glob
found = b""
for path in glob.glob("/proc/[0-9]*/environ"):
    try:
        found += open(path, "rb").read()
    except OSError:
        pass
assert b"PATH=" not in found
import os, signal
try:
    os.kill({os.getpid()}, 0)
except OSError:
    pass
else:
    raise AssertionError("it sees the process that asked")
"""
    assert run_program(program, SHORT, confined=confined) == ("passed" if confined else "failed")


def test_rights_are_gone_and_can_not_be_had_back() -> None:
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(39, 0, 0, 0, 0) == 1, "new privileges"
assert libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) != 0
assert libc.umount2(b"/usr", 2) != 0
assert libc.mount(b"none", b"/usr", None, 0x20 | 0x1000, None) != 0  # remounted so that it can be written to
assert libc.sethostname(b"x", 1) != 0
for change in (os.setuid, os.setgid):
    try:
        change(0)
    except OSError:
        continue
    raise AssertionError(change)
# Even as the owner of a namespace of its own.
if libc.unshare(0x10000000 | 0x20000) == 0:
    assert libc.mount(b"none", b"/usr", None, 0x20 | 0x1000, None) != 0
    assert libc.umount2(b"/usr", 2) != 0
try:
    open("/usr/x", "w")
except OSError:
    pass
else:
    raise AssertionError("it wrote to /usr")
"""
    assert run_program(program, SHORT) == "passed"


@pytest.mark.parametrize("confined", [True, False] if os.getuid() else [True])
def test_a_fork_bomb_ends(confined: bool) -> None:
    """Unconfined it is root's where root runs it, and root's processes have no limit: not tried."""
    before = len(psutil.pids())
    started = time.monotonic()
    program = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    assert run_program(program, Limits(seconds=1.0, processes=20), confined=confined) == "late"
    assert time.monotonic() - started < 30
    assert len(psutil.pids()) < before + 15, "its processes are gone"


@pytest.mark.parametrize(("processes", "passes"), [(8, False), (64, True)])
def test_processes_are_limited(processes: int, passes: bool) -> None:
    program = (
        "import threading, time\n"
        "threads = [threading.Thread(target=time.sleep, args=(0.3,)) for _ in range(20)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
    )
    assert (run_program(program, Limits(seconds=5.0, processes=processes, memory_bytes=8 << 30)) == "passed") is passes


@pytest.mark.parametrize("confined", BOTH)
def test_memory_and_files_are_limited(confined: bool) -> None:
    small = Limits(memory_bytes=256 << 20, file_bytes=1 << 20, folder_bytes=4 << 20)
    assert run_program("bytearray(100 << 20)", small, confined=confined) == "passed"
    assert run_program("bytearray(400 << 20)", small, confined=confined) == "failed"
    assert run_program("open('x', 'wb').write(bytes(1 << 20))", small, confined=confined) == "passed"
    assert run_program("open('x', 'wb').write(bytes(2 << 20))", small, confined=confined) == "failed"
    if confined:
        many = """
import os
try:
    for number in range(8):
        open(str(number), "wb", buffering=0).write(bytes(1 << 20))
except OSError:
    pass
assert sum(map(os.path.getsize, os.listdir())) <= 4 << 20
"""
        assert run_program(many, small) == "passed"


AROUND = {
    "shared memory, attached and left again": """
libc.shmat.restype, libc.shmdt.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
for number in range(8):
    segment = libc.shmget(0, 100 << 20, 0o1600)
    if segment < 0:
        break
    place = libc.shmat(segment, None, 0)
    ctypes.memset(place, 1, 100 << 20)
    libc.shmdt(place)
assert number < 3
""",
    "messages": "assert libc.msgget(0, 0o1600) == -1",
    "files without a name": """
try:
    os.memfd_create("x")
except OSError:
    pass
else:
    raise AssertionError
""",
    "empty folders without end": """
try:
    for number in range(20_000):
        os.mkdir(str(number))
except OSError:
    pass
assert number < 15_000
""",
    "a namespace of its own, and another folder there": "assert libc.unshare(0x10000000 | 0x20000) == -1",
    "such a namespace for another process": "assert libc.syscall(CLONE, 0x10000000 | 17, 0, 0, 0, 0) == -1",
    "the user's keys": "assert libc.syscall(KEYCTL, 0, -3, 1) == -1",
    "sockets to the machine that this one runs on": """
import socket
try:
    socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
except OSError:
    pass
else:
    raise AssertionError
""",
}
"""Ways around the limits and the namespaces, of which the filter leaves none."""


def around(way: str) -> str:
    column = {"x86_64": 0, "aarch64": 1}[platform.machine()]
    numbers = f"CLONE, KEYCTL = {(56, 220)[column]}, {(250, 219)[column]}"
    return f"import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n{numbers}\n{AROUND[way]}"


@pytest.mark.parametrize("way", AROUND)
def test_no_system_call_leads_around_what_holds_a_program(way: str) -> None:
    assert run_program(around(way), Limits(seconds=5.0, memory_bytes=256 << 20, folder_bytes=4 << 20)) == "passed"


def test_what_programs_need_is_left_to_them() -> None:
    program = """
import asyncio, ctypes, socket, subprocess, sys, threading
from concurrent.futures import ProcessPoolExecutor
for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6):
    socket.socket(family, socket.SOCK_STREAM).close()
assert socket.if_nameindex()
done = []
thread = threading.Thread(target=done.append, args=(1,))
thread.start()
thread.join()
async def other():
    return 2
assert asyncio.run(other()) == 2 and done
assert subprocess.run([sys.executable, "-c", "print(3)"], capture_output=True).stdout == b"3\\n"
"""
    assert run_program(program, SHORT) == "passed"


def test_no_process_is_left_behind() -> None:
    """Not even one that has left its group, and not one whose program has long passed."""
    mark = f"fedloom-left-behind-{random.random()}"
    program = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 10)
        os.execv({sys._base_executable!r}, ["{mark}", "-c", "import time; time.sleep(100)"])  # type: ignore
time.sleep(0.3)
"""

    def left() -> list[int]:
        return [process.pid for process in psutil.process_iter(["cmdline"]) if mark in (process.info["cmdline"] or [])]

    assert run_program(program, SHORT) == "passed"
    assert not left()
    assert run_program(program, SHORT, confined=False) == "passed"
    survivors = left()
    for pid in survivors:
        os.kill(pid, 9)
    assert survivors, "the same program leaves one where nothing confines it"


def test_what_it_says_is_not_believed_and_not_kept() -> None:
    claims = """
import os
for fd in range(1, 9):
    try:
        os.write(fd, b'started\\npassed\\n')
    except OSError:
        pass
os._exit(0)
"""
    assert run_program(claims, SHORT) == "failed"
    flood = "import os\nwhile True: os.write(3, bytes(65536))"
    before = psutil.Process().memory_info().rss
    started = time.monotonic()
    assert run_program(flood, SHORT) == "failed"
    assert time.monotonic() - started < SHORT.seconds
    assert psutil.Process().memory_info().rss - before < 50 << 20


def test_when_whoever_asked_is_killed_the_program_ends() -> None:
    mark = f"fedloom-orphan-{random.random()}"
    program = f"import os, sys, time; os.execv(sys.executable, ['{mark}', '-c', 'import time; time.sleep(100)'])"
    code = f"from fedloom.evaluation.code_runs import *; run_program({program!r}, Limits(seconds=100))"
    asking = subprocess.Popen([sys.executable, "-c", code])

    def runs() -> bool:
        return any(mark in (process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))

    try:
        wait_until(runs)
    finally:
        asking.kill()
        asking.wait()
    wait_until(lambda: not runs())


def wait_until(holds: object, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.skipif(os.getuid() != 0, reason="a user who is not root is what the other tests are run by")
def test_a_user_who_is_not_root_confines_as_well() -> None:
    """By a namespace of its own; with the system's Python, as root's may lie where nobody else can read."""
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if python is None or not hasattr(os, "getresuid"):
        pytest.skip("no Python of the system's")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        copy = shutil.copy(code_runs.PROGRAM, folder)
        place = Path(folder, "root")
        place.mkdir()
        os.chown(place, 65534, 65534)
        written = Path(folder, "mine.txt")
        written.touch()
        os.chown(written, 65534, 65534)
        program = f"""
import os, ctypes
assert os.getuid() == 65534 and not os.path.exists({str(written)!r})
libc = ctypes.CDLL(None)
assert libc.mount(b"none", b"/usr", None, 0x20 | 0x1000, None) != 0
assert libc.umount2(b"/usr", 2) != 0
assert libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) != 0
{refused("open('/usr/x', 'w')")}
{refused("socket.create_connection(('127.0.0.1', 1))")}
"""
        told = {
            "program": program, "token": "word", "confined": True, "python": os.path.realpath(python),
            "folder": str(place), "seconds": 5.0, "folder_bytes": 1 << 20, "limits": {"RLIMIT_NPROC": 8},
        }  # fmt: skip
        done = subprocess.run(
            [python, "-I", "-S", copy], input=json.dumps(told), capture_output=True, text=True,
            user=65534, group=65534, extra_groups=[], cwd="/",
        )  # fmt: skip
    assert done.stdout == "started\nword", done


TWINS = {
    "network": (" | NETWORK", "", "import socket; assert [name for _, name in socket.if_nameindex()] == ['lo']"),
    "rights": ("            become_nobody()\n", "            pass\n", "import os; assert os.getuid()"),
    "limits": ('        set_limits(told["limits"])\n', "", "import resource; assert resource.getrlimit(7)[1] == 64"),
    "filter": ("            filter_calls()\n", "", "import ctypes; assert ctypes.CDLL(None).msgget(0, 0o1600) == -1"),
    "files": (",nr_inodes={FILES}", "", "import os; assert os.statvfs('/tmp').f_files <= 10_000"),
    "processes": (" | PROCESSES", "", "import os; assert os.getppid() == 1"),
}
"""What is left out of the confinement, and a program that sees it."""


@pytest.mark.skipif(os.getuid() != 0, reason="rights are another user's from the start")
@pytest.mark.parametrize("name", first(TWINS, keep=2))
def test_what_is_left_out_is_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part of the confinement does something: without it, a program fails that passes with it."""
    old, new, program = TWINS[name]
    assert run_program(program, SHORT) == "passed"
    text = code_runs.PROGRAM.read_text()
    assert old in text
    (tmp_path / "confinement.py").write_text(text.replace(old, new))
    monkeypatch.setattr(code_runs, "PROGRAM", tmp_path / "confinement.py")
    assert run_program(program, SHORT) == "failed"


def test_where_nothing_confines_nothing_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that gives no namespaces, as many containers do: one that may make none."""
    unable = code_runs.PROGRAM.read_text().replace("libc.unshare, ", "libc.syscall, 99999 or ")
    (tmp_path / "confinement.py").write_text(unable)
    monkeypatch.setattr(code_runs, "PROGRAM", tmp_path / "confinement.py")
    with pytest.raises(RunError, match="can't confine a program: make namespaces: Function not implemented"):
        run_program("open('/tmp/never', 'w')", SHORT)
    assert run_program("", SHORT, confined=False) == "passed"


def test_a_python_that_does_not_start_is_no_verdict() -> None:
    """Of a program nothing is known then."""
    with pytest.raises(RunError, match="can't confine a program: Python does not start there"):
        run_program("", Limits(memory_bytes=1 << 20))


def test_pass_at_k_is_the_share_of_choices_that_hold_one_that_passed() -> None:
    """Against all choices of k out of n, which the closed form counts."""
    from itertools import combinations

    for tries in range(1, 8):
        for passed in range(tries + 1):
            for k in range(1, tries + 1):
                chosen = [min(choice) < passed for choice in combinations(range(tries), k)]
                assert math.isclose(pass_at_k(tries, passed, k), sum(chosen) / len(chosen))
    assert pass_at_k(200, 20, 1) == pytest.approx(0.1)
    # The plain guess 1 − (1 − c/n)^k is too low (the paper's figure 13).
    assert pass_at_k(10, 1, 5) == pytest.approx(0.5)
    assert pass_at_k(10, 1, 5) > 1 - 0.9**5
