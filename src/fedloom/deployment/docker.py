"""Docker's files for both sides of a deployment. They hold no secrets: keys and documents are mounted, read-only.

The server's container sees neither the authority's key nor anything of a client's; only the run directories, and the
client's journal, can be written.
"""

from __future__ import annotations

from pathlib import Path

from fedloom import __version__
from fedloom.errors import DeploymentError

DOCKERFILE = """\
# Written by fedloom provision compose. No secrets: .dockerignore lets nothing in but wheels.
FROM python:3.11-slim-bookworm AS client
# For a GPU: --build-arg TORCH=https://pypi.org/simple
ARG TORCH=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url "$TORCH" torch
# A wheel of fedloom beside this file is taken before the registry's.
RUN --mount=type=bind,target=/wheels pip install --no-cache-dir --find-links /wheels "fedloom[deploy]=={version}"
# Whoever it runs as can write models, and needs no entry in /etc/passwd.
RUN mkdir --mode 1777 /models
ENV HOME=/tmp USER=fedloom HF_HOME=/models PYTHONDONTWRITEBYTECODE=1
USER 1000:1000
WORKDIR /fedloom
ENTRYPOINT ["fedloom"]

FROM client AS server
USER root
RUN apt-get update && apt-get install --yes --no-install-recommends nginx-light && rm -rf /var/lib/apt/lists/*
USER 1000:1000
"""
IGNORE = "*\n!*.whl\n"
HARDENED = """\
    user: ${{FEDLOOM_USER:-1000:1000}}
    init: true
    read_only: true
    cap_drop: [ALL]
    security_opt: ["no-new-privileges:true"]
    stop_signal: SIGTERM
    stop_grace_period: 60s
"""
SERVER = (
    """\
# Written by fedloom provision compose. In this folder: fedloom-server/ (of provision init), recipe.toml, runs/, and
# data/ for documents of the server's own. FEDLOOM_USER is who owns them: $(id -u):$(id -g)
#   docker compose -f compose.server.yaml up --build
services:
  server:
    build: {{context: ., target: server}}
    image: fedloom-server:{version}
    command: [serve, recipe.toml, --out, "runs/${{FEDLOOM_RUN:-first}}", --resume]
"""
    + HARDENED
    + """\
    restart: on-failure:5
    ports: ["${{FEDLOOM_PORT:-8443}}:${{FEDLOOM_PORT:-8443}}"]
    # nginx writes its configuration beside the certificates; the authority's key stays outside.
    tmpfs: [/tmp, "/fedloom/fedloom-server:mode=1777"]
    volumes:
      - ./fedloom-server/server.toml:/fedloom/fedloom-server/server.toml:ro
      - ./fedloom-server/ca.crt:/fedloom/fedloom-server/ca.crt:ro
      - ./fedloom-server/server.crt:/fedloom/fedloom-server/server.crt:ro
      - ./fedloom-server/server.key:/fedloom/fedloom-server/server.key:ro
      - ./fedloom-server/signing.key:/fedloom/fedloom-server/signing.key:ro
      - ./fedloom-server/clients:/fedloom/fedloom-server/clients:ro
      - ./recipe.toml:/fedloom/recipe.toml:ro
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
# FEDLOOM_USER is who owns them: $(id -u):$(id -g)
#   FEDLOOM_NAME=alice FEDLOOM_DATA=./documents docker compose -f compose.client.yaml up --build
services:
  client:
    build: {{context: ., target: client}}
    image: fedloom-client:{version}
    # With a policy: mount ./policy.toml as the kit is, and add --policy, policy.toml
    command: [join, "${{FEDLOOM_NAME}}.kit", --data, /data, --journal, journal/rounds.jsonl]
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
    paths = [folder / name for name in FILES]
    for path in paths:
        if path.exists():
            raise DeploymentError("the file exists", where=str(path), mend="name another folder with --to")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in zip(paths, FILES.values(), strict=True):
            path.write_text(text.format(version=__version__), encoding="utf-8")
    except OSError as error:
        raise DeploymentError(f"can't be written ({error.strerror})", where=str(folder)) from None
    return paths
