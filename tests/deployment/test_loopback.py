"""What another user of the server's machine gets from the SuperLink's port: nothing that operates it."""

import ssl
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPSConnection

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from fedloom.deployment import provisioning
from fedloom.deployment.processes import free_port, private_folder
from fedloom.deployment.superlink import SuperLink


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[provisioning.Security]:
    """The keys of a SuperLink whose app was submitted, through the path that the others are refused on."""
    security = provisioning.init(tmp_path_factory.mktemp("keys") / "server", "localhost", free_port())
    with private_folder() as folder, closing(SuperLink(folder, security.port, security)) as link:
        link.open()
        assert link.nodes() == []
        yield security


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/control/list-runs", 403),
        ("/v1/control/start-run", 403),
        ("/v1/control/register-node", 403),
        ("/v1/control/stop-run", 403),
        ("//v1/control/list-runs", 403),
        ("/V1/control/list-runs", 403),
        ("/v1/fleet/../control/list-runs", 404),
        ("/v1/fleet/%2e%2e/control/list-runs", 404),
        ("/docs", 403),
        ("/v1/runtime/acquire-task", 401),
    ],
)
def test_who_has_the_certificate_alone_operates_nothing(door: provisioning.Security, path: str, status: int) -> None:
    trust = ssl.create_default_context(cafile=door.ca)
    with closing(HTTPSConnection("localhost", door.port, context=trust, timeout=60)) as connection:
        connection.request("POST", path, b"", {"content-type": "application/protobuf"})
        answer = connection.getresponse()
        told = answer.read()
    assert answer.status == status, told
