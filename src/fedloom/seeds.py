"""Every random choice is drawn from (seed, purpose, round, client) and from nothing else.

So a client's result does not depend on who trained beside it, and a resumed run needs no generator state.
"""

import hashlib


def derive_seed(seed: int, purpose: str, round: int = 0, client: int = 0) -> int:
    """A 63-bit seed for one purpose in one round at one client."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{round}/{client}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
