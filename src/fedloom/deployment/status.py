"""Status of a server, told to whoever asks before it knows them: whether it has its clients' keys, and the time there.

Nothing here depends on who asks, so nobody learns which keys it knows. No torch here.
"""

from __future__ import annotations

STATUS_PATH = "/v1/fleet/fedloom-status"
"""Path that anybody may ask: HTTP 204 where the server takes its clients, 503 where it does not yet."""
SIGNATURE_PATH = "/v1/fleet/fedloom-signature"
"""Path that nginx asks, with a request's headers, before it reads the request's body."""
STAMP_HEADER = "x-fedloom-time"
"""Header with the server's time at the moment of the answer: seconds since 1970, three places."""
KEYS_HEADER = "x-fedloom-keys-seconds"
"""Header with the seconds since the server looked at the list of its clients. It looks between two waits, and not while
it computes: until it has looked again, a key that it does not know may have been approved."""
MOST_BODY_BYTES = 4 * 2**20
"""Largest body of a request. A chunk of an adapter is 1 MiB (`processes.FLOWER`); what is not cut into chunks is an
answer's manifest, with 30 bytes for each step of a round."""
