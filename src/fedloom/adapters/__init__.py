"""Adapters: the weights that are trained and exchanged."""

import logging

# PEFT imports bitsandbytes wherever it is installed. On some processors that tells of a kernel which it could not load,
# and which is for products without a gradient alone: loading.py has these layers do without.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))
