"""The hub's side of an upload, by what its own client asks: who it is, a repository, large files, a commit."""

from __future__ import annotations

import base64
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from support.hub_here import Hub

TOKEN = "hf_" + "x" * 34
NAME = r"([\w.-]+/[\w.-]+)"


def answer_upload(hub: Hub, command: str, path: str, body: bytes, token: str) -> tuple[int, Any] | None:
    """Return a status and what is told, or None where it is about no upload."""
    from support.hub_here import LARGE

    if command == "PUT" and (found := re.fullmatch(r"/upload/([0-9a-f]{64})", path)):
        hub.large[found[1]] = body
        return 200, {}
    asks = ("/api/whoami", "/api/repos/create", "/api/validate-yaml")
    if not (path.startswith(asks) or re.search(r"/(preupload|commit)/|\.git/info/lfs/", path)):
        return None
    if path == "/api/validate-yaml":
        return 200, {"errors": [], "warnings": []}
    if token != f"Bearer {TOKEN}":
        return 401, {"error": "Invalid username or password."}
    if path.startswith("/api/whoami"):
        return 200, {"type": "user", "name": "someone", "auth": {}}
    told = json.loads(body.splitlines()[0])
    if path == "/api/repos/create":
        name = f"{told['organization']}/{told['name']}"
        if told["organization"] != "someone":
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        hub.add_model(name, {}).private = told["visibility"] == "private"
        return 200, {"url": f"{hub.address}/{name}"}
    if found := re.fullmatch(rf"/api/models/{NAME}/preupload/main", path):
        modes = {file["path"]: "lfs" if file["path"].endswith(LARGE) else "regular" for file in told["files"]}
        return 200, {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]}
    if found := re.fullmatch(rf"/{NAME}\.git/info/lfs/objects/batch", path):
        objects = [
            {**one, "actions": {"upload": {"href": f"{hub.address}/upload/{one['oid']}"}}} for one in told["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}
    if found := re.fullmatch(rf"/api/models/{NAME}/commit/main", path):
        files = {}
        for line in body.splitlines()[1:]:
            value = json.loads(line)["value"]
            content = value.get("content")
            files[value["path"]] = hub.large[value["oid"]] if content is None else base64.b64decode(content)
        commit = hub.models[found[1]].commit(files, title=told["value"]["summary"])
        return 200, {"commitUrl": f"{hub.address}/{found[1]}/commit/{commit}", "commitOid": commit, "success": True}
    return None
