"""A hub of this machine: as much of the Hugging Face hub's API as fedloom and its libraries ask, over made-up files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants
import huggingface_hub.hf_api
import pytest
import torch
import transformers.utils.hub
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel

from fedloom.model.source import byte_tokenizer
from support.hub_uploads import answer_upload

OWNER, BOT = "someone", "SFconvertbot"
DATE = "2022-05-11T08:25:17.000Z"
LARGE = (".bin", ".safetensors", ".parquet", ".gz")
"""Endings of files that the hub keeps by their SHA-256."""


def make_opt(longest: int) -> OPTForCausalLM:
    """OPT-350M's kind, tiny: its head is tied to its embedding, its embedding narrower than its layers."""
    torch.manual_seed(1)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=260,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            max_position_embeddings=longest,
            do_layer_norm_before=False,
        )
    )


def files_of(model: PreTrainedModel, folder: Path) -> dict[str, bytes]:
    """A model's files with a tokenizer of bytes, made in an empty folder."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@dataclass(frozen=True)
class Commit:
    id: str
    author: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """A model or a data set: branches and pull requests, each a list of commits, the oldest first."""

    name: str
    gated: bool = False
    private: bool = False
    references: dict[str, list[Commit]] = field(default_factory=lambda: {"main": []})
    discussions: list[dict[str, Any]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], *, author: str = OWNER, title: str = "", reference: str = "main") -> str:
        """Add a commit with these files over those that are there; return its id."""
        commits = self.references[reference]
        whole = {**(commits[-1].files if commits else {}), **files}
        told = json.dumps([self.name, author, title, len(commits), reference, *map(digest, whole.values()), *whole])
        commits.append(Commit(hashlib.sha1(told.encode()).hexdigest(), author, title, whole))
        return commits[-1].id

    def request(
        self,
        files: dict[str, bytes],
        *,
        author: str = BOT,
        status: str = "open",
        title: str = "Adding `safetensors` variant of this model",
    ) -> str:
        """Open a pull request with one commit by its author on top of main; return the commit's id."""
        number = len(self.discussions) + 1
        reference = f"refs/pr/{number}"
        self.references[reference] = list(self.references["main"])
        self.discussions.append(
            {
                "num": number,
                "title": title,
                "status": status,
                "isPullRequest": True,
                "author": {"name": author},
                "createdAt": DATE,
                "repo": {"name": self.name, "type": "model"},
            }
        )
        return self.commit(files, author=author, title=title, reference=reference)

    def find(self, revision: str) -> list[Commit] | None:
        """Return the commits up to a revision, None if there is none."""
        if revision in self.references:
            return self.references[revision]
        for commits in self.references.values():
            for number, commit in enumerate(commits, start=1):
                if commit.id == revision:
                    return commits[:number]
        return None


class Hub:
    """The hub's repositories, and what it was asked."""

    def __init__(self) -> None:
        self.models: dict[str, Repository] = {}
        self.datasets: dict[str, Repository] = {}
        self.asked: list[str] = []
        self.address = ""
        self.large: dict[str, bytes] = {}
        """Large files that were uploaded, by their SHA-256."""
        self.drips: dict[str, int] = {}
        """Ending of a file -> the bytes of it that are sent every tenth of a second, after the first thousand."""

    def add_model(self, name: str, files: dict[str, bytes], *, gated: bool = False) -> Repository:
        return self._add(self.models, name, files, gated)

    def add_dataset(self, name: str, files: dict[str, bytes], *, gated: bool = False) -> Repository:
        return self._add(self.datasets, name, files, gated)

    def _add(self, kind: dict[str, Repository], name: str, files: dict[str, bytes], gated: bool) -> Repository:
        kind[name] = Repository(name, gated)
        kind[name].commit(files)
        return kind[name]

    def downloads(self, ending: str) -> list[str]:
        """Return what was downloaded whole of files that end so."""
        return [line for line in self.asked if line.startswith("GET") and "/resolve/" in line and line.endswith(ending)]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def describe(name: str, content: bytes) -> dict[str, Any]:
    """Describe a file as the hub does: of a large one, its SHA-256 too."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    large = {"lfs": {"sha256": digest(content), "oid": digest(content), "size": len(content), "pointerSize": 134}}
    return {"size": len(content), "blobId": blob, "oid": blob, **(large if name.endswith(LARGE) else {})}


def list_folder(files: dict[str, bytes], folder: str, *, deep: bool = False) -> list[dict[str, Any]]:
    """List a folder of a repository, and with `deep` everything."""
    start = f"{folder}/" if folder else ""
    inside = {name: content for name, content in files.items() if name.startswith(start)}
    if not inside:
        raise RefusedError(404, "EntryNotFound")
    folders = {start + name.removeprefix(start).split("/")[0] for name in inside if "/" in name.removeprefix(start)}
    here = {name: content for name, content in inside.items() if "/" not in name.removeprefix(start)}
    return [
        *({"type": "directory", "path": name, "oid": digest(name.encode())[:40], "size": 0} for name in folders),
        *(
            {"type": "file", "path": name, **describe(name, content)}
            for name, content in (inside if deep else here).items()
        ),
    ]


class RefusedError(Exception):
    """An answer that the hub's client makes an error of, by its code."""

    def __init__(self, status: int, code: str) -> None:
        self.status, self.code = status, code
        super().__init__(code)


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        wbufsize = 0
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.answer()

        do_PUT = do_POST

        def answer(self) -> None:
            path = urlsplit(self.path).path
            hub.asked.append(f"{self.command} {path}")
            body = self.body if self.command in ("POST", "PUT") else b""
            if told := answer_upload(hub, self.command, path, body, self.headers.get("Authorization") or ""):
                self.send(told[0], json.dumps(told[1]).encode())
                return
            try:
                kind, repository, verb, rest = self.route(path)
                if verb == "resolve":
                    self.send_file(repository, unquote(rest))
                else:
                    self.send(200, json.dumps(self.tell(kind, repository, verb, rest)).encode())
            except RefusedError as refusal:
                self.send(refusal.status, b"{}", {"X-Error-Code": refusal.code, "X-Error-Message": refusal.code})

        def route(self, path: str) -> tuple[str, Repository, str, str]:
            """Take an address apart: what it is about, what is asked of it, and of which revision or file."""
            words = re.fullmatch(
                r"/(?:api/(models|datasets)/|(datasets)/|)([\w.-]+/[\w.-]+)"
                r"(?:/(revision|tree|paths-info|commits|discussions|resolve|refs)(?:/(.*))?)?",
                path,
            )
            if words is None:
                raise RefusedError(404, "")
            kind = words[1] or words[2] or "models"
            repository = (hub.models if kind == "models" else hub.datasets).get(words[3])
            if repository is None:
                raise RefusedError(401, "RepoNotFound")
            return kind, repository, words[4] or "", words[5] or ""

        def commits(self, repository: Repository, revision: str) -> list[Commit]:
            found = repository.find(unquote(revision))
            if found is None:
                raise RefusedError(404, "RevisionNotFound")
            return found

        def tell(self, kind: str, repository: Repository, verb: str, rest: str) -> Any:
            if verb == "discussions":
                known = repository.discussions
                return {"discussions": known, "count": len(known), "start": 0}
            if verb == "refs":
                told = [
                    {"name": name, "ref": name, "targetCommit": commits[-1].id}
                    for name, commits in repository.references.items()
                ]
                return {"branches": told[:1], "converts": [], "tags": [], "pullRequests": told[1:]}
            revision, _, folder = rest.partition("/")
            commits = self.commits(repository, revision or "main")
            if verb == "commits":
                return [
                    {"id": c.id, "title": c.title, "message": "", "date": DATE, "authors": [{"user": c.author}]}
                    for c in reversed(commits)
                ]
            files = commits[-1].files
            if verb == "tree":
                return list_folder(files, unquote(folder))
            if verb == "paths-info":
                asked = parse_qs(self.body.decode())["paths"]
                return [entry for entry in list_folder(files, "", deep=True) if entry["path"] in asked]
            siblings = [{"rfilename": name, **describe(name, content)} for name, content in files.items()]
            return {
                "id": repository.name,
                "sha": commits[-1].id,
                "private": repository.private,
                "gated": "manual" if repository.gated else False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": siblings,
                **({"lastModified": DATE} if kind == "datasets" else {}),
            }

        def send_file(self, repository: Repository, rest: str) -> None:
            # A reference has slashes of its own: refs/pr/7.
            revision, _, name = rest.partition("/") if not rest.startswith("refs/") else (
                "/".join(rest.split("/")[:3]), "/", "/".join(rest.split("/")[3:])
            )  # fmt: skip
            commits = self.commits(repository, revision)
            if repository.gated:
                raise RefusedError(403, "GatedRepo")
            content = commits[-1].files.get(name)
            if content is None:
                raise RefusedError(404, "EntryNotFound")
            told = describe(name, content)
            tag = told["lfs"]["sha256"] if "lfs" in told else told["blobId"]
            facts = {"ETag": f'"{tag}"', "X-Repo-Commit": commits[-1].id, "Accept-Ranges": "bytes"}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if wanted:
                begin, end = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
                facts["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
                self.send(206, content[begin : end + 1], facts)
            else:
                self.send(200, content, facts)

        def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            drip = next((size for ending, size in hub.drips.items() if self.path.endswith(ending)), len(content))
            with suppress(BrokenPipeError, ConnectionResetError):  # given up
                self.wfile.write(content[:1000])
                for begin in range(1000, len(content), drip):
                    time.sleep(0.1 if drip < len(content) else 0)
                    self.wfile.write(content[begin : begin + drip])

    return Handler


@contextmanager
def open_hub() -> Iterator[Hub]:
    """A hub at an address of its own, for programs that are told so by `environment_of`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def environment_of(hub: Hub, home: Path) -> dict[str, str]:
    """An environment for a program that asks this hub, with caches of its own."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))},
        "HF_ENDPOINT": hub.address,
        "HF_HOME": f"{home}/hub",
        "FEDLOOM_CACHE": f"{home}/cache",
        "OMP_NUM_THREADS": "1",
    }


def ask_here(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the libraries of this process ask this hub for models, with caches of their own: each keeps its address."""
    constants = huggingface_hub.constants
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setenv("FEDLOOM_CACHE", str(home / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.address)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
