"""Registry of a SuperLink's nodes: takes many keys, or lets go of many nodes, in one process. No torch here.

Flower's own `flwr supernode register` is a process for each key, of a second or more. This is a program that reads one
JSON object, does what it says over the same API, and writes one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from fedloom.deployment.flower.guard import SECRET_HEADER
from fedloom.deployment.processes import CONTROL_SECRET


def run_nodes() -> None:
    """Read names with their keys in OpenSSH's form, and numbers of nodes to let go, and write who was refused and why.

    Its arguments are the SuperLink's address and the file of its certificate authority, empty for plain HTTP.
    """
    from flwr.proto.control_pb2 import UnregisterNodeRequest
    from flwr.supercore.control import ControlHttpClient

    address, ca = sys.argv[1:]
    told: Mapping[str, Any] = json.load(sys.stdin)
    with ControlHttpClient.from_server_address(address, not ca, ca or None, ()) as client:
        client._client.headers[SECRET_HEADER] = os.environ[CONTROL_SECRET]

        def register(name: str) -> None:
            client.RegisterNode(_ask_for(name, told["register"][name]))

        def unregister(node: str) -> None:
            client.UnregisterNode(UnregisterNodeRequest(node_id=int(node)))

        refused = {name: why for name in told["register"] if (why := _try(register, name))}
        refused |= {node: why for node in told["unregister"] if (why := _try(unregister, node))}
    json.dump(refused, sys.stdout)


def _ask_for(name: str, key: str) -> Any:
    """Ask for a node with this name and key.

    Raises:
        ValueError: it is not a key that a node may have.
    """
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key
    from flwr.proto.control_pb2 import RegisterNodeRequest
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes, uses_nist_ec_curve

    public = load_ssh_public_key(key.encode())
    if not isinstance(public, ec.EllipticCurvePublicKey) or not uses_nist_ec_curve(public):
        raise ValueError("not a key of a NIST curve")
    return RegisterNodeRequest(public_key=public_key_to_bytes(public), name=name)


def _try(do: Callable[[str], None], which: str) -> str:
    """Do it, and return why it was not done; nothing if it was. One that is refused keeps no other away."""
    import httpx
    from cryptography.exceptions import UnsupportedAlgorithm
    from flwr.supercore.error import FlowerError

    try:
        do(which)
    except httpx.HTTPStatusError as error:
        told = FlowerError.from_json(error.response.text)
        return told.message if told else f"HTTP {error.response.status_code}"
    except (httpx.HTTPError, ValueError, UnsupportedAlgorithm) as error:
        return str(error) or type(error).__name__
    return ""
