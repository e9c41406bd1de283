"""Helm chart as data, as Helm makes objects of it, and those by Kubernetes' own schemas. No cluster is here."""

import os
import re
import subprocess
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("cryptography", reason="comes with Flower: pip install 'fedloom[deploy]'")

from support.helm import MISSING, SCHEMAS_MISSING, Object, check_fields, helm, render
from support.json_schema import jsonschema
from typer.testing import CliRunner

from fedloom import __version__
from fedloom.cli import app
from fedloom.deployment.approvals import CLIENTS, SEEN
from fedloom.deployment.client_keys import NAME, check_private
from fedloom.deployment.helm import read_chart, write_chart
from fedloom.deployment.keys import approve, init, open_server, request, revoke
from fedloom.errors import DeploymentError

with_helm = pytest.mark.skipif(bool(MISSING), reason=MISSING)
SIDES = ("server", "client")
IMAGE = f"registry.example.org/fedloom@sha256:{'0' * 64}"
FINGERPRINT = "3f2a 91bc 0000 1111 2222 3333 4444 5555"
VALUES: dict[str, dict[str, Any]] = {
    "server": {
        "side": "server",
        "image": IMAGE,
        "secret": "fedloom-server",
        "server": {
            "command": ["serve", "/etc/fedloom/recipe.toml", "--out", "runs/first", "--resume"],
            "recipe": 'name = "first"\n',
        },
    },
    "client": {
        "side": "client",
        "image": IMAGE,
        "secret": "fedloom-alice",
        "documents": {"persistentVolumeClaim": {"claimName": "documents"}},
        "client": {"name": "alice", "fingerprint": FINGERPRINT, "policy": 'text = "story"\n'},
    },
}
"""The fewest values that a side does with; a server of one recipe has that, too, and a client a policy."""


def with_value(side: str, key: str, value: object) -> dict[str, Any]:
    """Return a side's values with one more; None takes a value away."""
    values = deepcopy(VALUES[side])
    *sections, last = key.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    if value is None:
        del place[last]
    return values


def make(folder: Path, values: Mapping[str, Any]) -> dict[str, Object]:
    """Write the chart, and return what it makes of values."""
    return render(*written(folder, values))


def written(folder: Path, values: Mapping[str, Any]) -> tuple[Path, Path]:
    write_chart(folder / "chart")
    (folder / "values.yaml").write_text(yaml.safe_dump(dict(values)))
    return folder / "chart", folder / "values.yaml"


def pod_of(objects: Mapping[str, Object]) -> Object:
    found: Object = objects["StatefulSet"]["spec"]["template"]["spec"]
    return found


# As data, without Helm


def test_what_a_persons_terminal_shows_is_what_was_written(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["provision", "helm", "--to", str(tmp_path / "chart")])
    assert done.exit_code == 0
    assert done.output.split() == [str(tmp_path / "chart" / name) for name in read_chart()]
    told = yaml.safe_load((tmp_path / "chart" / "Chart.yaml").read_text())
    assert (told["version"], told["appVersion"]) == (__version__, __version__)


@pytest.mark.parametrize("name", read_chart())
def test_a_file_that_is_there_stays_as_it_is(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(DeploymentError, match="the file exists; name another folder with --to"):
        write_chart(tmp_path)
    assert [(path, path.read_text()) for path in tmp_path.rglob("*") if path.is_file()] == [(tmp_path / name, "mine")]


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay values over others, as Helm does."""
    both = {
        key: merged(below[key], value) if isinstance(value, Mapping) and key in below else value
        for key, value in above.items()
    }
    return {**below, **both}


def complaints(values: Mapping[str, Any]) -> list[str]:
    """Say what the chart's own schema finds wrong with values, once they lie over its defaults."""
    chart = read_chart()
    schema = yaml.safe_load(chart["values.schema.json"])
    jsonschema.Draft7Validator.check_schema(schema)
    whole = merged(yaml.safe_load(chart["values.yaml"]), values)
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(whole)]


@pytest.mark.parametrize("side", SIDES)
def test_the_fewest_values_are_enough(side: str) -> None:
    assert not complaints(VALUES[side])


WRONG = [
    *((side, key, None) for side in SIDES for key in ("side", "image", "secret")),
    ("server", "server.recipe", None),
    ("client", "client.name", None),
    ("client", "client.fingerprint", None),
    ("client", "documents", None),
    ("server", "image", "registry.example.org/fedloom:0.1.0"),
    ("server", "image", "registry.example.org/fedloom@sha256:abc"),
    ("server", "side", "both"),
    ("server", "user", 0),
    ("server", "sevrer", {}),
    ("server", "server.ports", [8443]),
    ("server", "server.service.type", "Host"),
    ("server", "server.ingress.enabled", True),
    ("client", "client.name", "../alice"),
    ("client", "client.fingerprint", FINGERPRINT[:-4]),
]


@pytest.mark.parametrize(("side", "key", "value"), WRONG)
def test_what_has_to_be_set_and_what_can_not_be_is_refused(side: str, key: str, value: object) -> None:
    assert complaints(with_value(side, key, value))


def test_a_server_that_stays_needs_no_recipe() -> None:
    assert not complaints({key: value for key, value in VALUES["server"].items() if key != "server"})
    assert yaml.safe_load(read_chart()["values.yaml"])["server"]["command"] == ["serve"]


def test_a_name_in_the_chart_is_one_that_a_client_may_have() -> None:
    schema = yaml.safe_load(read_chart()["values.schema.json"])
    assert schema["properties"]["client"]["properties"]["name"]["pattern"] == f"^{NAME.pattern}$"


# By Helm


@with_helm
@pytest.mark.parametrize("side", SIDES)
def test_helm_finds_nothing_wrong(side: str, tmp_path: Path) -> None:
    chart, values = written(tmp_path, VALUES[side])
    done = helm("lint", "--strict", chart, "--values", values)
    assert done.returncode == 0, done.stdout + done.stderr


@with_helm
@pytest.mark.parametrize(
    ("file", "whole", "broken"),
    [
        ("values.yaml", "# Three values", "image: fedloom:latest\n#"),
        ("templates/side.yaml", "{{- end }}", ""),
        ("templates/network.yaml", "fedloom.selector", "fedloom.selectors"),
    ],
)
def test_helm_finds_what_is_wrong(file: str, whole: str, broken: str, tmp_path: Path) -> None:
    """Where nothing is said, that is because nothing is wrong."""
    chart, values = written(tmp_path, {key: told for key, told in VALUES["server"].items() if key != "image"})
    (tmp_path / "values.yaml").write_text(
        (tmp_path / "values.yaml").read_text() + ("" if file == "values.yaml" else f"image: {IMAGE}\n")
    )
    (chart / file).write_text((chart / file).read_text().replace(whole, broken, 1))
    assert helm("lint", chart, "--values", values).returncode != 0


@with_helm
@pytest.mark.parametrize("side", SIDES)
def test_a_pod_can_do_no_more_than_it_must(side: str, tmp_path: Path) -> None:
    pod = pod_of(make(tmp_path, VALUES[side]))
    assert (pod["automountServiceAccountToken"], pod["enableServiceLinks"]) == (False, False)
    assert pod["securityContext"] == {
        "runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000,
        "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip
    assert not {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName", "shareProcessNamespace"} & {*pod}
    containers = [*pod["initContainers"], *pod["containers"]]
    assert len(containers) == 2
    for container in containers:
        assert container["image"] == IMAGE
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
        }  # fmt: skip
        assert container["resources"]["limits"]["memory"]
        written = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert written <= {"/fedloom", "/tmp", "/keys"}
    (main,) = pod["containers"]
    # The Secret is seen while keys are laid out, and not by what speaks with the network.
    assert "secret" not in {mount["name"] for mount in main["volumeMounts"]}


@with_helm
def test_the_authoritys_key_is_never_in_the_pod(tmp_path: Path) -> None:
    pod = pod_of(make(tmp_path, VALUES["server"]))
    (secret,) = (volume["secret"] for volume in pod["volumes"] if "secret" in volume)
    told = [item["key"] for item in secret["items"]]
    assert sorted(told) == ["ca.crt", "server.crt", "server.key", "server.toml", "signing.key"]
    assert secret["defaultMode"] == 0o400


def lay_out(pod: Object, folder: Path, files: Mapping[str, bytes]) -> None:
    """Carry out what a pod begins with, on files as the kubelet lays them out of a Secret: a group's to read."""
    for place in ("secret", "keys", "fedloom"):
        (folder / place).mkdir(exist_ok=True)
    (secret,) = (volume["secret"] for volume in pod["volumes"] if "secret" in volume)
    for item in secret["items"]:
        (folder / "secret" / item["path"]).write_bytes(files[item["key"]])
        (folder / "secret" / item["path"]).chmod(0o440)
    (first,) = pod["initContainers"]
    shell, option, script = first["command"]
    for place in ("/secret", "/keys"):
        script = script.replace(place, f"{folder}{place}")
    subprocess.run([shell, option, script], cwd=folder / "fedloom", env={"PATH": os.environ["PATH"]}, check=True)


@with_helm
def test_a_servers_keys_are_its_own_and_its_list_of_clients_stays(tmp_path: Path) -> None:
    here = init(tmp_path / "here", "fed.example.org", 8443).folder
    files = {path.name: path.read_bytes() for path in here.iterdir() if path.is_file()}
    pod = pod_of(make(tmp_path, VALUES["server"]))
    lay_out(pod, tmp_path, files)
    there = tmp_path / "fedloom" / "fedloom-server"
    assert {path.name for path in there.iterdir()} == {*files, CLIENTS, SEEN} - {"ca.key"}
    assert open_server(there).host == "fed.example.org"
    approve(there, request("alice", tmp_path / "alice"), tmp_path)
    approve(there, request("bob", tmp_path / "bob"), tmp_path)
    revoke(there, "bob")
    # The next pod of this volume, after something let a group in.
    for path in there.rglob("*"):
        path.chmod(path.stat().st_mode | 0o070)
    with pytest.raises(DeploymentError, match="others on this machine can read the private key"):
        open_server(there)
    lay_out(pod, tmp_path, {**files, "server.toml": b'host = "fed.example.com"\nport = 8443\n'})
    assert open_server(there).host == "fed.example.com", "the Secret is gone by anew"
    assert list(open_server(there).clients()) == ["alice"]


@with_helm
def test_a_clients_key_is_its_own_and_its_journal_too(tmp_path: Path) -> None:
    files = {"alice.kit": b"a kit", "alice.key": b"a key"}
    (tmp_path / "fedloom" / "journal").mkdir(parents=True)
    secret = tmp_path / "fedloom" / "journal" / "rounds.secret"
    secret.write_bytes(b"0" * 32)
    secret.chmod(0o660)
    lay_out(pod_of(make(tmp_path, VALUES["client"])), tmp_path, files)
    assert {path.name: path.read_bytes() for path in (tmp_path / "keys").iterdir()} == files
    for key in (tmp_path / "keys" / "alice.key", secret):
        check_private(key)
    assert not (tmp_path / "fedloom" / "alice.key").exists(), "it is in memory alone"


@with_helm
@pytest.mark.parametrize("side", SIDES)
def test_the_command_of_a_pod_is_one(side: str, tmp_path: Path) -> None:
    (container,) = pod_of(make(tmp_path, VALUES[side]))["containers"]
    assert "command" not in container, "the image's own, with the first process that it has"
    command, *words = container["args"]
    known = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    options = [word for word in words if word.startswith("--")]
    assert len(options) > 2
    assert all(option in known for option in options)
    files = {word for word in words if word.startswith("/")}
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert all(file in mounts or str(Path(file).parent) in mounts for file in files)


@with_helm
def test_a_server_is_watched_at_its_health_address_and_through_its_proxy(tmp_path: Path) -> None:
    (container,) = pod_of(make(tmp_path, VALUES["server"]))["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert container["args"][-2:] == ["--metrics", f"0.0.0.0:{ports['metrics']}"]
    for probe in ("startupProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "metrics"}
    words = container["readinessProbe"]["exec"]["command"]
    assert words == ["python", "-m", "fedloom.deployment.health", "server", "fedloom-server"]


@with_helm
def test_a_client_that_waits_for_its_server_is_not_killed(tmp_path: Path) -> None:
    (container,) = pod_of(make(tmp_path, VALUES["client"]))["containers"]
    assert not {"livenessProbe", "startupProbe"} & {*container}
    words = container["readinessProbe"]["exec"]["command"]
    assert words == ["python", "-m", "fedloom.deployment.health", "client"]


@with_helm
def test_clients_reach_the_servers_port_and_nobody_a_client(tmp_path: Path) -> None:
    made = make(tmp_path / "server", with_value("server", "server.port", 9443))
    service = made["Service"]["spec"]
    assert service["ports"] == [{"name": "clients", "port": 9443, "targetPort": "clients"}]
    assert (service["type"], service["externalTrafficPolicy"]) == ("LoadBalancer", "Local")
    labels = made["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    assert service["selector"].items() <= labels.items()
    (container,) = pod_of(made)["containers"]
    assert {"name": "clients", "containerPort": 9443} in container["ports"]
    rules = made["NetworkPolicy"]["spec"]["ingress"]
    assert [rule for rule in rules if "from" not in rule] == [{"ports": [{"port": "clients"}]}]
    client = make(tmp_path / "client", VALUES["client"])
    assert {*client} == {"StatefulSet", "ConfigMap", "NetworkPolicy"}
    assert client["NetworkPolicy"]["spec"]["ingress"] == []


@with_helm
def test_an_ingress_hands_tls_through_by_the_name_in_the_kits(tmp_path: Path) -> None:
    values = with_value("server", "server.ingress", {"enabled": True, "host": "fed.example.org", "class": "nginx"})
    values["server"] |= {"port": 443, "service": {"type": "ClusterIP"}}
    made = make(tmp_path, values)
    (rule,) = made["Ingress"]["spec"]["rules"]
    assert rule["host"] == "fed.example.org"
    assert made["Ingress"]["metadata"]["annotations"] == {"nginx.ingress.kubernetes.io/ssl-passthrough": "true"}
    assert made["Ingress"]["spec"]["ingressClassName"] == "nginx"
    assert "externalTrafficPolicy" not in made["Service"]["spec"]
    # Without rights of its own, the proxy may listen there.
    sysctls = pod_of(made)["securityContext"]["sysctls"]
    assert sysctls == [{"name": "net.ipv4.ip_unprivileged_port_start", "value": "0"}]


@with_helm
@pytest.mark.parametrize("word", ["null", "123", "true", "1.5"])
def test_a_word_stays_the_word_that_was_written(word: str, tmp_path: Path) -> None:
    """A Secret of such a name was none to Kubernetes, and an image was a list without its digest."""
    values = with_value("server", "server.ingress", {"enabled": True, "host": word, "class": word})
    values |= {"secret": word, "storage": {"size": "1Gi", "class": word}, "image": f"[a,b]#{IMAGE}"}
    made = make(tmp_path, values)
    pod, ingress = pod_of(made), made["Ingress"]["spec"]
    assert pod["volumes"][0]["secret"]["secretName"] == word
    assert [one["image"] for one in pod["initContainers"] + pod["containers"]] == [f"[a,b]#{IMAGE}"] * 2
    assert made["StatefulSet"]["spec"]["volumeClaimTemplates"][0]["spec"]["storageClassName"] == word
    assert (ingress["ingressClassName"], ingress["rules"][0]["host"], ingress["tls"]) == (
        word,
        word,
        [{"hosts": [word]}],
    )


@with_helm
def test_another_recipe_makes_another_pod(tmp_path: Path) -> None:
    odd = '\n  name = "{{ .Values.secret }}"\n# "\u00e9"\n'
    marks = []
    for number, text in enumerate([VALUES["server"]["server"]["recipe"], odd]):
        made = make(tmp_path / str(number), with_value("server", "server.recipe", text))
        assert made["ConfigMap"]["data"] == {"recipe.toml": text}
        marks.append(made["StatefulSet"]["spec"]["template"]["metadata"]["annotations"])
    assert marks[0] != marks[1]


EVERY = {
    "imagePullSecrets": [{"name": "registry"}],
    "storage": {"size": "1Ti", "class": "fast"},
    "documents": {"nfs": {"server": "files", "path": "/documents"}},
    "environment": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}],
    "resources": {"limits": {"nvidia.com/gpu": 1, "memory": "8Gi"}},
    "annotations": {"prometheus.io/scrape": "true"},
    "nodeSelector": {"gpu": "h100"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "server": {
        "ingress": {"enabled": True, "host": "fed.example.org", "class": "nginx"},
        "service": {"annotations": {"a/b": "c"}},
    },
    "client": {"options": ["--text", "story"]},
}
"""Every value that a side may have beside the fewest."""


@with_helm
@pytest.mark.skipif(bool(SCHEMAS_MISSING), reason=SCHEMAS_MISSING)
@pytest.mark.parametrize("more", [{}, EVERY], ids=["fewest", "every"])
@pytest.mark.parametrize("side", SIDES)
def test_kubernetes_knows_every_field(side: str, more: Mapping[str, Any], tmp_path: Path) -> None:
    values = merged(VALUES[side], more)
    if more:  # one source, and not two
        values["documents"] = EVERY["documents"]
    made = make(tmp_path, values)
    for told in made.values():
        check_fields(told)
    pod = pod_of(made)
    pod["automountServiceAccountTokens"] = False
    with pytest.raises(jsonschema.ValidationError, match="automountServiceAccountTokens"):
        check_fields(made["StatefulSet"])
    if more:
        (container,) = pod["containers"]
        assert container["env"][1:] == EVERY["environment"]
        assert container["resources"] == {
            "requests": {"cpu": "1", "memory": "2Gi"},
            "limits": {"nvidia.com/gpu": 1, "memory": "8Gi"},
        }
        assert (pod["nodeSelector"], pod["tolerations"]) == (EVERY["nodeSelector"], EVERY["tolerations"])
        assert pod["imagePullSecrets"] == EVERY["imagePullSecrets"]
        assert {"name": "documents", **EVERY["documents"]} in pod["volumes"]
        (claim,) = made["StatefulSet"]["spec"]["volumeClaimTemplates"]
        assert claim["spec"]["storageClassName"] == "fast"
        assert side == "server" or container["args"][-2:] == ["--text", "story"]


@with_helm
@pytest.mark.parametrize("side", SIDES)
def test_what_helm_says_at_the_end_are_commands(side: str, tmp_path: Path) -> None:
    chart, values = written(tmp_path, VALUES[side])
    done = helm("install", "fed", chart, "--values", values, "--dry-run=client", "--namespace", "fl")
    assert done.returncode == 0, done.stderr
    notes = done.stdout.partition("NOTES:")[2]
    told = re.findall(r"fedloom ([a-z]+)( [a-z]+)?", notes.partition("\n\n")[2])
    assert told
    for command, part in told:
        words = [command, *part.split(), "--help"] if command == "provision" else [command, "--help"]
        assert CliRunner().invoke(app, words).exit_code == 0
