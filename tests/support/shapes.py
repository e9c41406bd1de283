"""Architectures that tests cover. No torch here: the process that only hands out tests to workers reads this."""

ARCHITECTURES = {
    "tiny-opt": ("q_proj", "v_proj"),
    "tiny-llama": ("q_proj", "v_proj"),
    "tiny-gpt2": ("c_attn",),
}
"""Shapes that every architecture test covers, `make test` with the first, and the layers that adapters sit on."""
