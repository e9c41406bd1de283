"""Live page of a run, for a browser: read-only, behind a token, one file, and nothing from elsewhere.

The page itself is an empty frame. What it shows it asks for with its token, which stands in the address's fragment: a
browser sends no fragment to anybody, and the page takes it out of the address bar.
"""

from __future__ import annotations

import hmac
import json
import secrets
from collections.abc import Mapping
from functools import cache
from http import HTTPStatus
from importlib import resources

import jinja2

from fedloom.monitoring.board import Board
from fedloom.monitoring.web import Answer, Answering, Web, is_loopback
from fedloom.progress import Say

DOCUMENT = "/run.json"
POLL_SECONDS = 2
POLICY = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; img-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy of the page: its own script and style, and its own server."""


class Page(Answering):
    """A page that shows a board until it is closed."""

    def __init__(self, board: Board, address: tuple[str, int], say: Say, token: str | None = None) -> None:
        """Show a board at a host and port, and say where, with the token, which is drawn where none is given."""
        self._board, self.token = board, token or secrets.token_urlsafe(24)
        self._web = Web("page", address, self._respond, say)
        if self.port is not None:
            host = f"[{address[0]}]" if ":" in address[0] else address[0]
            say("page", f"http://{host}:{self.port}/#{self.token}")
            if not is_loopback(address[0]):
                say("note", "the page is open to the network, without TLS: who is on the way can read its token")

    def _respond(self, path: str, headers: Mapping[str, str]) -> Answer | None:
        if path == "/":
            nonce = secrets.token_urlsafe(16)
            shown = _template().render(nonce=nonce, document=DOCUMENT, seconds=POLL_SECONDS)
            return Answer(shown, "text/html; charset=utf-8", headers={"Content-Security-Policy": POLICY.format(nonce)})
        # Compared as bytes: of texts, only those of ASCII can be.
        given, asked = headers.get("authorization", ""), f"Bearer {self.token}"
        if not hmac.compare_digest(given.encode(errors="replace"), asked.encode()):
            return Answer("a token is needed\n", status=HTTPStatus.UNAUTHORIZED, headers={"WWW-Authenticate": "Bearer"})
        if path == DOCUMENT:
            return Answer(json.dumps(self._board.document()), "application/json")
        return None


@cache
def _template() -> jinja2.Template:
    text = (resources.files("fedloom.monitoring") / "page.html.j2").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(text)
