"""Write `requirements/`: every version of constraints.txt with the hashes of its files, for pip --require-hashes.

Run it after constraints.txt or a dependency in pyproject.toml has changed; it asks the package index for hashes alone.
Each package stands in one file: `deploy.txt` has all that either side of a deployment runs on, the others what their
extra of pyproject.toml adds to it. torch stands apart, since its CPU build comes from an index of its own, and so does
CUDA, which only the other build needs: its versions are torch's own choice. So does pip, which installs the others.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXTRAS = ("deploy", "dev", "docs", "bench", "evaluate", "oracles")
"""Extras of pyproject.toml; each file leaves out what those before it have."""
PYTHON = "3.11.5"
"""Oldest Python that all of it runs on; for what `make test` needs, 3.11 does."""
TORCH_CPU = {"6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b": "2.13.0+cpu, cp311, Linux x86-64"}
"""SHA-256 of builds of torch that no package index lists: those that fedloom was tested with."""
OTHER_SYSTEMS = re.compile(r"; sys_platform == '(win32|darwin)'")
HEAD = "# Written by scripts/write_hashes.py: {what}\n"


def compile_pins(*words: str) -> dict[str, str]:
    """Resolve requirements for every system, and return each one's lines by its name."""
    command = [sys.executable, "-m", "uv", "--quiet", "pip", "compile", "--generate-hashes", "--no-annotate", *words]
    told = subprocess.run([*command, "--no-header"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    blocks = re.findall(r"^\S.*\n(?:    .*\n)+", told, re.MULTILINE)
    return {block.partition("==")[0]: block for block in blocks if not OTHER_SYSTEMS.search(block)}


def read_pins() -> dict[str, str]:
    """Return the versions of constraints.txt, by names as an index spells them."""
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in (line.split("==") for line in lines)}


def write(name: str, what: str, blocks: dict[str, str]) -> None:
    text = HEAD.format(what=what) + "".join(blocks[key] for key in sorted(blocks))
    (ROOT / "requirements" / f"{name}.txt").write_text(text, encoding="utf-8")
    print(f"{name}: {len(blocks)}")


def main() -> None:
    """Write all files."""
    (ROOT / "requirements").mkdir(exist_ok=True)
    pins, seen = read_pins(), {}
    layers = {}
    for extra in EXTRAS:
        found = compile_pins(
            "--universal", "--python-version", PYTHON, "--constraint", "constraints.txt", "--extra", extra,
            "pyproject.toml",
        )  # fmt: skip
        layers[extra] = {name: block for name, block in found.items() if name not in seen}
        seen |= found
    cuda = {name: layers["deploy"].pop(name) for name in seen if name not in pins and name in layers["deploy"]}
    torch = {"torch": layers["deploy"].pop("torch")}
    torch["torch"] = torch["torch"].rstrip() + "".join(f" \\\n    --hash=sha256:{one}" for one in TORCH_CPU) + "\n"
    if others := seen.keys() - pins.keys() - cuda.keys():
        raise SystemExit(f"not in constraints.txt: {', '.join(sorted(others))}")
    # What no extra asks for is installed by itself, without what it would need.
    with tempfile.NamedTemporaryFile("w", suffix=".in") as file:
        file.write("".join(f"{name}=={pins[name]}\n" for name in pins.keys() - seen.keys()))
        file.flush()
        layers["dev"] |= compile_pins("--no-deps", file.name)
    write("pip", "what installs the others", {"pip": layers["dev"].pop("pip")})
    write("torch", "its builds of the package index, and a CPU build", torch)
    write("cuda", "what torch's build of the package index needs of NVIDIA's", cuda)
    for extra, blocks in layers.items():
        write(extra, f"the extra {extra}, without what the files before it have", blocks)


if __name__ == "__main__":
    main()
