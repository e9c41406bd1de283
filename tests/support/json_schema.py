"""jsonschema without its grammar of IRIs, which takes seconds to build on import; no schema here asks for it."""

import sys

import pytest

with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, "rfc3987_syntax", None)  # which jsonschema takes for one that is not installed
    import jsonschema

__all__ = ["jsonschema"]
