"""Seeds for every random choice, drawn from (seed, purpose, round, client) and from nothing else.

So a client's result does not depend on who trained beside it, and a resumed run needs no generator state.
"""

import hashlib


def derive_seed(seed: int, purpose: str, round: int = 0, client: int = 0) -> int:
    """Return a seed of 63 bits for one purpose, in one round, at one client."""
    # Not hash(): Python salts it, so it differs from process to process.
    digest = hashlib.sha256(f"{seed}/{purpose}/{round}/{client}".encode()).digest()
    # 63 bits fit into a signed 64-bit integer.
    return int.from_bytes(digest[:8], "big") >> 1
