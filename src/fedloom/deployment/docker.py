"""Docker's files for both sides of a deployment. They hold no secrets: keys and documents are mounted, read-only.

The server stays, and takes what is submitted to it. Its container sees neither the authority's key nor anything of a
client's; only its queue and the run directories, and the client's journal, can be written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedloom import __version__
from fedloom.errors import DeploymentError

DOCKERFILE = """\
# Written by fedloom provision compose. No secrets: .dockerignore lets in what make dist made, and nothing else.
# The image to begin with, python:3.11-slim-bookworm by its digest: a tag is whatever it leads to today.
ARG BASE
FROM ${{BASE}} AS client
ARG BASE
RUN case "$BASE" in *@sha256:*) ;; *) echo "BASE has to be named by its digest: IMAGE@sha256:..." >&2; exit 1;; esac
# The release's hash, which make dist prints. All that is installed is checked by it: the wheel, and others' files by
# the hashes that came with it.
ARG SUMS
RUN --mount=type=bind,target=/dist cd /dist && echo "$SUMS  SHA256SUMS" | sha256sum --check && \\
    sha256sum --check --ignore-missing SHA256SUMS
ENV PIP_NO_CACHE_DIR=1 PIP_NO_DEPS=1 PIP_ONLY_BINARY=:all: PIP_DISABLE_PIP_VERSION_CHECK=1
# For a GPU: --build-arg GPU=1
ARG GPU=
RUN --mount=type=bind,target=/dist cd /dist && if [ "$GPU" ]; then \\
    pip install --require-hashes -r requirements-torch.txt -r requirements-cuda.txt; else \\
    pip install --require-hashes --index-url https://download.pytorch.org/whl/cpu -r requirements-torch.txt; fi
RUN --mount=type=bind,target=/dist cd /dist && pip install --require-hashes -r requirements-deploy.txt && \\
    pip install --no-index ./fedloom-{version}-py3-none-any.whl
# The first process takes leave of those whose parent has ended; fedloom waits for its own alone.
RUN apt-get update && apt-get install --yes --no-install-recommends tini && rm -rf /var/lib/apt/lists/*
# Whoever it runs as can write models, and needs no entry in /etc/passwd.
RUN mkdir --mode 1777 /models
ENV HOME=/tmp USER=fedloom HF_HOME=/models PYTHONDONTWRITEBYTECODE=1
USER 1000:1000
WORKDIR /fedloom
ENTRYPOINT ["tini", "--", "fedloom"]

FROM client AS server
USER root
RUN apt-get update && apt-get install --yes --no-install-recommends nginx-light && rm -rf /var/lib/apt/lists/*
USER 1000:1000
"""
IGNORE = "*\n!*.whl\n!requirements-*.txt\n!SHA256SUMS\n"
BUILD = """\
    # FEDLOOM_BASE and FEDLOOM_SUMS, best in a file .env beside this one: the head of the Dockerfile says what they are.
    build:
      context: .
      target: SIDE
      args:
        BASE: "${{FEDLOOM_BASE:?python:3.11-slim-bookworm by its digest, IMAGE@sha256:...}}"
        SUMS: "${{FEDLOOM_SUMS:?the hash of SHA256SUMS that make dist printed}}"
        GPU: "${{FEDLOOM_GPU:-}}"
    image: fedloom-SIDE:{version}
"""
HARDENED = """\
    user: ${{FEDLOOM_USER:-1000:1000}}
    read_only: true
    cap_drop: [ALL]
    security_opt: ["no-new-privileges:true"]
    stop_signal: SIGTERM
    stop_grace_period: 60s
"""
SERVER = (
    """\
# Written by fedloom provision compose. In this folder: fedloom-server/ (of provision init), recipes/, runs/, and data/
# for documents of the server's own. FEDLOOM_USER is who owns them: $(id -u):$(id -g). The head of the Dockerfile says
# what the image needs.
#   docker compose -f compose.server.yaml up --build --detach
# It stays, and takes the runs that are submitted to it; so does its page, whose address is in its logs:
#   docker compose -f compose.server.yaml exec server fedloom submit recipes/first.toml
#   docker compose -f compose.server.yaml exec server fedloom runs
#   docker compose -f compose.server.yaml logs server
# For one run, which ends:
#   docker compose -f compose.server.yaml run --rm --service-ports server serve recipes/first.toml --out runs/first
services:
  server:
"""
    + BUILD.replace("SIDE", "server")
    + """\
    # FEDLOOM_OPTIONS: more words behind serve, as --wait 3600
    command: serve --page 0.0.0.0:8080 ${{FEDLOOM_OPTIONS:-}}
"""
    + HARDENED
    + """\
    restart: unless-stopped
    ports:
      - "${{FEDLOOM_PORT:-8443}}:${{FEDLOOM_PORT:-8443}}"
      # The page, for browsers of this machine alone.
      - "127.0.0.1:${{FEDLOOM_PAGE:-8080}}:8080"
    # nginx writes its configuration beside the certificates; the authority's key stays outside.
    tmpfs: [/tmp, "/fedloom/fedloom-server:mode=1777"]
    volumes:
      - ./fedloom-server/server.toml:/fedloom/fedloom-server/server.toml:ro
      - ./fedloom-server/ca.crt:/fedloom/fedloom-server/ca.crt:ro
      - ./fedloom-server/server.crt:/fedloom/fedloom-server/server.crt:ro
      - ./fedloom-server/server.key:/fedloom/fedloom-server/server.key:ro
      - ./fedloom-server/signing.key:/fedloom/fedloom-server/signing.key:ro
      - ./fedloom-server/clients:/fedloom/fedloom-server/clients:ro
      # When each client was last there, which provision list shows, and the runs that were submitted.
      - ./fedloom-server/seen:/fedloom/fedloom-server/seen
      - ./fedloom-server/queue:/fedloom/fedloom-server/queue
      - ./recipes:/fedloom/recipes:ro
      - ./data:/fedloom/data:ro
      - ./runs:/fedloom/runs
      - models:/models
    healthcheck:
      test: [CMD, python, -m, fedloom.deployment.health, server, fedloom-server]
      interval: 30s
      timeout: 15s
      retries: 4
      start_period: 120s
volumes:
  models:
"""
)
CLIENT = (
    """\
# Written by fedloom provision compose. In this folder: NAME.key and NAME.kit, and journal/, its record of questions.
# FEDLOOM_USER is who owns them: $(id -u):$(id -g). FEDLOOM_FINGERPRINT is what the server's owner reads aloud.
#   FEDLOOM_NAME=alice FEDLOOM_DATA=./documents docker compose -f compose.client.yaml up --build
services:
  client:
"""
    + BUILD.replace("SIDE", "client")
    + """\
    # With a policy: mount ./policy.toml as the kit is, and add --policy, policy.toml
    command: [join, "${{FEDLOOM_NAME}}.kit", --data, /data, --journal, journal/rounds.jsonl,
      --fingerprint, "${{FEDLOOM_FINGERPRINT:?what the server's owner reads aloud}}"]
"""
    + HARDENED
    + """\
    restart: unless-stopped
    tmpfs: [/tmp]
    volumes:
      - ./${{FEDLOOM_NAME:?the name in the kit}}.kit:/fedloom/${{FEDLOOM_NAME}}.kit:ro
      - ./${{FEDLOOM_NAME}}.key:/fedloom/${{FEDLOOM_NAME}}.key:ro
      - ${{FEDLOOM_DATA:?a folder of documents}}:/data:ro
      - ./journal:/fedloom/journal
      - models:/models
    healthcheck:
      test: [CMD, python, -m, fedloom.deployment.health, client]
      interval: 30s
      timeout: 15s
      retries: 4
      start_period: 60s
volumes:
  models:
"""
)
FILES = {
    "Dockerfile": DOCKERFILE,
    ".dockerignore": IGNORE,
    "compose.server.yaml": SERVER,
    "compose.client.yaml": CLIENT,
}


def write_compose(folder: Path) -> list[Path]:
    """Write what `docker compose` needs for either side.

    Raises:
        DeploymentError: one of the files is there already, or the folder can't be written.
    """
    return write_files(folder, {name: text.format(version=__version__) for name, text in FILES.items()})


def write_files(folder: Path, texts: Mapping[str, str]) -> list[Path]:
    """Write texts into files of these names, none of which is there, and return where they are.

    Raises:
        DeploymentError: one of the files is there already, or the folder can't be written.
    """
    paths = [folder / name for name in texts]
    for path in paths:
        if path.exists():
            raise DeploymentError("the file exists", where=str(path), mend="name another folder with --to")
    try:
        for path, text in zip(paths, texts.values(), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        mend = "name another folder with --to"
        raise DeploymentError(f"can't be written ({error.strerror})", where=str(folder), mend=mend) from None
    return paths
