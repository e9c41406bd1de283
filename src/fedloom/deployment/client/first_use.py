"""First use of a kit: the documents' owner confirms whose server it is, once; then it is remembered. No torch here.

Who could exchange a kit on its way would have the client train for a server of his own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedloom.deployment.client.joining import Kit
from fedloom.deployment.client_keys import public_key_of
from fedloom.deployment.fingerprints import identify_client, read_fingerprint
from fedloom.errors import DeploymentError
from fedloom.host.files import write_private

ASK = "Compare both with the server's owner, aloud. Type yes if they are the same, or the server's as you hear it: "


def confirm_server(
    kit: Kit, told: str | None, ask: Callable[[str], str] | None, say: Callable[[str, str], object]
) -> None:
    """Go on with the server that was confirmed for this key; at first use, have it confirmed and remember it.

    `told` is the fingerprint that its owner read aloud, where that was typed with the command; `ask` puts a question to
    a person, where one is there.

    Raises:
        DeploymentError: it is not confirmed, or another server than before.
    """
    if not kit.key:  # without certificates, on this machine alone
        if told is not None:
            raise DeploymentError(
                "a kit without a certificate has no fingerprint",
                where="--fingerprint",
                mend="leave it out, or ask the server's owner for a kit with a certificate (fedloom provision approve)",
            )
        return
    server, file = kit.fingerprint, _file_of(kit, kit.key)
    if told is not None and read_fingerprint(told) != server:
        raise _exchanged(kit)
    if not is_confirmed(kit, kit.key):
        if told is None:
            _have_confirmed(kit, kit.key, ask, say)
        try:
            write_private(file, f"{server}\n".encode())
        except OSError as error:
            if told is None:  # with it, every start confirms anew: a container's files are for reading alone
                raise DeploymentError(
                    f"can't be written ({error.strerror})",
                    where=str(file),
                    mend=f"see that it may be, or start with --fingerprint '{server}'",
                ) from None


def is_confirmed(kit: Kit, key: Path) -> bool:
    """Return whether somebody has confirmed the server of a kit with this key.

    Raises:
        DeploymentError: another server was confirmed for it.
    """
    file, server = _file_of(kit, key), kit.fingerprint
    known = _read(file)
    if known is not None and known != server:
        raise DeploymentError(
            f"{kit.name}'s key goes with another server: {known} was confirmed, this kit's is {server}",
            where=str(file),
            mend="ask the server's owner; if that one has begun anew and reads this kit's aloud, remove the file",
        )
    return known is not None


def _file_of(kit: Kit, key: Path) -> Path:
    return key.with_name(f"{kit.name}.known")


def _read(file: Path) -> str | None:
    try:
        return read_fingerprint(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, DeploymentError):
        raise DeploymentError(
            "the server that was confirmed can't be read from it",
            where=str(file),
            mend="remove it, and have the fingerprint confirmed again",
        ) from None


def _have_confirmed(kit: Kit, key: Path, ask: Callable[[str], str] | None, say: Callable[[str, str], object]) -> None:
    if ask is None:
        raise DeploymentError(
            "the server's fingerprint was not confirmed yet, and there is no terminal to ask on",
            where=kit.name,
            mend="have the server's owner read it aloud, and name it: --fingerprint 'HEX ...'",
        )
    say("server", f"{kit.server} has the fingerprint {kit.fingerprint}")
    say("key", f"{kit.name}'s has the fingerprint {identify_client(kit.name, public_key_of(key))}")
    try:
        answer = ask(ASK).strip()
    except EOFError:
        answer = ""
    if not answer or answer.lower() == "no":
        raise DeploymentError(
            "the server's fingerprint was not confirmed",
            where=kit.name,
            mend="if the server's owner reads another aloud, ask for the kit again; else start fedloom join again",
        )
    if answer.lower() != "yes" and read_fingerprint(answer) != kit.fingerprint:
        raise _exchanged(kit)


def _exchanged(kit: Kit) -> DeploymentError:
    return DeploymentError(
        f"this kit is of another server: its fingerprint is {kit.fingerprint}",
        where=f"{kit.name}'s kit",
        mend="have the server's owner read it again; if it differs still, the kit was exchanged on its way",
    )
