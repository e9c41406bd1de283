"""A process that says nothing: late by its own pace, given up by it, and back; and waits that look up."""

import socket
import threading
import time

import pytest

from fedloom.experiment import silence
from fedloom.experiment.silence import LookingSocket, Silence, SilentError
from fedloom.host.frames import Frame, receive_frame, send_frame


class Hand:
    """Hand of a clock that a test turns."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.said: list[str] = []

    def __call__(self) -> float:
        return self.seconds

    def say(self, what: str, detail: str) -> None:
        self.said.append(f"{what}: {detail}")


def test_a_process_is_late_and_given_up_by_its_own_pace() -> None:
    now = Hand()
    clock = Silence("beta/cpu", now.say, now)
    for seconds in (3, 200, 4):
        now.seconds += seconds
        clock.end()
    assert now.said == [], "nobody looked"
    clock.has_pace = True
    now.seconds += 599
    clock.look()
    assert now.said == []
    now.seconds += 2
    clock.look()
    now.seconds += 1300
    clock.look()
    late = "late: beta/cpu has said nothing for 10:01, and for 3:20 at most before; given up after 33:20"
    assert now.said == [late], "once"
    clock.end()
    assert now.said == [late, "back: beta/cpu, after 31:41 of silence"]
    now.seconds += 19_000
    clock.look()
    now.seconds += 11
    with pytest.raises(SilentError, match=r"^said nothing for 5:16:51, and for 31:41 at most before$"):
        clock.look()


@pytest.mark.parametrize(("has_pace", "most"), [(False, 3600), (True, 900)])
def test_a_quick_process_has_its_minutes_and_one_whose_pace_is_not_known_an_hour(has_pace: bool, most: int) -> None:
    now = Hand()
    clock = Silence("beta/cpu", now.say, now)
    clock.has_pace = has_pace
    now.seconds = 60
    clock.look()
    assert now.said == []
    now.seconds = most
    clock.look()
    assert len(now.said) == 1
    now.seconds += 1
    with pytest.raises(SilentError):
        clock.look()


def looking(one: socket.socket) -> LookingSocket:
    found = LookingSocket(fileno=one.detach())
    found.look = found.moved = bool
    return found


def test_a_frame_that_comes_slowly_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "LOOK_SECONDS", 0.01)
    ours, theirs = socket.socketpair()
    frame, came, looks = Frame({"do": "train"}, bytes(range(256)) * 40_000), [], []
    clock = Silence("beta/cpu", lambda *said: None)

    def read_slowly() -> None:
        while len(came) < 2:
            theirs.settimeout(60)
            came.append(receive_frame(theirs))
            time.sleep(0.2)

    with looking(ours) as connection, theirs:
        connection.moved, connection.look = clock.end, lambda: looks.append(clock.look())
        reading = threading.Thread(target=read_slowly)
        reading.start()
        for _ in range(2):
            send_frame(connection, frame)
        reading.join()
        threading.Timer(0.2, send_frame, (theirs, frame)).start()
        assert receive_frame(connection) == frame
    assert came == [frame, frame]
    assert looks, "it looked up"
    assert clock._longest > 0.1


@pytest.mark.parametrize("waits", ["to send", "to hear", "for the rest of a frame"])
def test_a_wait_ends_when_a_look_says_so(waits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "LOOK_SECONDS", 0.01)

    def look() -> None:
        raise SilentError

    ours, theirs = socket.socketpair()
    with looking(ours) as connection, theirs:
        connection.look = look
        if waits == "for the rest of a frame":
            theirs.sendall(bytes(5))
        with pytest.raises(SilentError):
            send_frame(connection, Frame({}, bytes(2**23))) if waits == "to send" else receive_frame(connection)
