"""Preflight of `fedloom join`, before it starts anything: whose server answers, if any, and what time it is there."""

import http.server
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="comes with Flower: pip install 'fedloom[deploy]'")

from fedloom.deployment import certificates, keys
from fedloom.deployment.client import preflight
from fedloom.deployment.client.preflight import (
    CLOCK_TRIES,
    AbsentError,
    Greeting,
    await_server,
    check_clock,
    greet_server,
)
from fedloom.deployment.keys import Security, init
from fedloom.deployment.processes import free_port
from fedloom.deployment.status import KEYS_HEADER, STAMP_HEADER, STATUS_PATH
from fedloom.errors import DeploymentError


@contextmanager
def server(
    security: Security | None,
    *,
    ahead: float = 0,
    port: int = 0,
    stamp: str | None = None,
    statuses: Sequence[int] = (204,),
    off: Sequence[float] = (),
) -> Iterator[str]:
    """Serve answers, with a clock of its own; over plain HTTP without certificates.

    The last of `statuses` is that of all further answers; `off` is what the clock is ahead in the first ones.
    """
    left, clocks = [*statuses], [*off]

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == STATUS_PATH
            status = left.pop(0) if len(left) > 1 else left[0]
            now = time.time() + (clocks.pop(0) if clocks else ahead)
            self.send_response_only(status)
            self.send_header("Date", "Mon, 23 Nov 2020 06:21:23 GMT")  # of a cache: nobody looks at it
            if status != 502:
                self.send_header(STAMP_HEADER, f"{now:.3f}" if stamp is None else stamp)
                self.send_header(KEYS_HEADER, "7.5")
            self.end_headers()

    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Answer) as listener:
        listener.handle_error = lambda *_: None  # type: ignore[method-assign]
        if security:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(security.certificate, security.key)
            listener.socket = context.wrap_socket(listener.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=listener.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"localhost:{listener.server_address[1]}"
        finally:
            listener.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def security(tmp_path_factory: pytest.TempPathFactory) -> Security:
    return init(tmp_path_factory.mktemp("keys") / "server", "localhost", 1)


def ca(security: Security) -> str:
    return security.ca.read_text()


def test_the_kits_server_is_told_by_its_certificates_last_day(security: Security) -> None:
    with server(security) as there:
        assert greet_server(there, ca(security)) == Greeting(keys.describe_expiry(security.expires()), 7.5)
    with server(None) as there:
        assert greet_server(there, "") == Greeting("", 7.5)


def test_another_authoritys_server_is_refused(security: Security, tmp_path: Path) -> None:
    other = init(tmp_path / "other", "localhost", 1)
    with server(other) as there, pytest.raises(DeploymentError, match="not signed by the kit's authority"):
        greet_server(there, ca(security))


def test_a_certificate_for_another_name_is_refused(
    security: Security, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "LOOPBACK", ())
    other = init(tmp_path / "other", "fed.example.org", 1)
    with server(other) as there, pytest.raises(DeploymentError, match="the server's certificate is not for localhost"):
        greet_server(there, ca(other))


def test_what_speaks_no_tls_and_a_kit_without_a_certificate_in_it_are_refused(security: Security) -> None:
    with server(None) as there:
        with pytest.raises(DeploymentError, match="TLS fails"):
            greet_server(there, ca(security))
        with pytest.raises(DeploymentError, match="the kit's certificate can't be read"):
            greet_server(there, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")


@pytest.mark.parametrize(
    ("ahead", "why"),
    [
        (-25, r"this machine's clock is 2[45] s ahead of the server's: Flower refuses more than 5 s; set it"),
        (400, r"this machine's clock is (399|400) s behind the server's: Flower refuses more than 305 s; set it"),
        (-3 * 86400, r"this machine's clock is (2 days, 23:59:5.|3 days, 0:00:00) ahead of the server's"),
        (400 * 86400, r"this machine's clock is (399 days, 23:59:5.|400 days, 0:00:00) behind the server's"),
    ],
)
@pytest.mark.parametrize("secure", [True, False])
def test_a_clock_that_flower_would_refuse_is_said(ahead: float, why: str, secure: bool, security: Security) -> None:
    """Look at the clock before the certificate's dates, which a clock that is years off would make look wrong."""
    with (
        server(security if secure else None, ahead=ahead) as there,
        pytest.raises(DeploymentError, match=why),
    ):
        greet_server(there, ca(security) if secure else "")


@pytest.mark.parametrize("ahead", [-3, 0, 250])
def test_a_clock_that_flower_takes_is_taken(ahead: float, security: Security) -> None:
    with server(security, ahead=ahead) as there:
        greet_server(there, ca(security))


@pytest.mark.parametrize("stamp", ["", "soon", "nan", "-1", "inf", "9" * 30, "Mon, 23 Nov 2026 06:21:23 GMT"])
def test_a_servers_time_that_is_none_is_not_compared(stamp: str) -> None:
    with server(None, stamp=stamp) as there:
        assert greet_server(there, "").words == ""


def test_a_clock_that_is_off_in_one_answer_is_not_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a machine that was stopped between two readings another try; three times is no accident."""
    monkeypatch.setattr(preflight, "AGAIN_SECONDS", 0.05)
    with server(None, off=[-60] * (CLOCK_TRIES - 1)) as there:
        assert await_server(there, "", lambda *_: None, lambda: None).words == ""
    with server(None, off=[-60] * CLOCK_TRIES) as there, pytest.raises(DeploymentError, match="60 s ahead of"):
        await_server(there, "", lambda *_: None, lambda: None)


def test_a_server_that_is_not_ready_is_waited_for_and_refuses_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "AGAIN_SECONDS", 0.05)
    said: list[str] = []
    with server(None, statuses=[502, 502, 503, 503, 204]) as there:
        assert await_server(there, "", lambda what, detail: said.append(f"{what} {detail}"), lambda: None).words == ""
        words = [
            f"waiting for {there}: {why}" for why in ("it is starting, or starting again", "it reads its clients' keys")
        ]
    assert said == words, "each once"


def test_a_slow_link_does_not_make_a_clock_look_wrong() -> None:
    """Allow for a server that read its clock somewhere between our question and its answer."""
    check_clock(1000.0, 995.0, 1030.0)
    check_clock(1000.0, 1004.9, 1030.0)
    with pytest.raises(DeploymentError, match="6 s ahead of"):
        check_clock(1000.0, 1006.0, 1030.0)
    check_clock(1000.0, 600.0, 695.5)
    with pytest.raises(DeploymentError, match="306 s behind"):
        check_clock(1000.0, 600.0, 694.0)


@pytest.mark.parametrize(
    ("days", "moved", "why"),
    [
        (0, 0, r"expired on \d{4}-\d\d-\d\d.*fedloom provision renew"),
        (365, 3600, r"begins on \d{4}-\d\d-\d\d \d\d:\d\d UTC"),
    ],
)
def test_a_certificate_of_another_time_is_refused_where_both_clocks_agree(
    days: int, moved: float, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None) -> datetime:  # type: ignore[override, no-untyped-def]
            return datetime.now(tz) + timedelta(seconds=moved)

    with monkeypatch.context() as patched:
        patched.setattr(certificates, "datetime", Clock)
        patched.setattr(keys, "SERVER_DAYS", days)
        patched.setattr(keys, "open_server", lambda folder: Security(folder, "localhost", 1))
        other = init(tmp_path / "other", "localhost", 1)
    with server(other) as there, pytest.raises(DeploymentError, match=why):
        greet_server(there, ca(other))


def test_a_certificate_that_ends_soon_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "SERVER_DAYS", 20)
    other = init(tmp_path / "other", "localhost", 1)
    with server(other) as there:
        assert "ONLY 19 DAYS LEFT" in greet_server(there, ca(other)).words


@pytest.mark.long
def test_a_server_that_is_not_there_yet_is_waited_for(security: Security) -> None:
    port, said = free_port(), []
    with pytest.raises(AbsentError, match="connection refused"):
        greet_server(f"localhost:{port}", ca(security))

    def come() -> None:
        time.sleep(1)
        with server(security, port=port):
            time.sleep(4)

    coming = threading.Thread(target=come)
    coming.start()
    words = await_server(
        f"localhost:{port}", ca(security), lambda what, detail: said.append((what, detail)), lambda: None
    )
    coming.join()
    assert words.words.startswith("the certificate is valid until")
    assert said == [("waiting", f"for localhost:{port}: connection refused")]


def test_waiting_for_a_server_can_be_ended(security: Security) -> None:
    looks = []

    def check() -> None:
        looks.append(1)
        if len(looks) > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await_server(f"localhost:{free_port()}", ca(security), lambda *_: None, check)


def test_behind_a_proxy_of_the_environment_nothing_is_checked(
    security: Security, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower goes through the proxy, and ours would not."""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    assert greet_server("fed.example.org:8443", ca(security)).words == ""
