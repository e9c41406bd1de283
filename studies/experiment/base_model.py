"""What a tier is made of: Python files of the installed packages, and for `nano` a small model that has read some.

All packages are pinned, so that every machine has the same files. Everything lies in the cache, nothing in git.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from fedloom.experiment.run import run
from fedloom.handover.export import export
from fedloom.host.files import replace_folder
from fedloom.recipe.loading import load_recipe

HERE = Path(__file__).parent
READ = ("torch", "transformers")
"""Packages whose files the small model learns Python from."""
UNREAD = ("fontTools", "matplotlib", "networkx", "numpy", "pandas", "pygments", "scipy", "sqlalchemy", "sympy")
"""Packages whose files the clients hold: the small model has read none of them."""
LEAST_BYTES = 200
"""Size below which a file has nothing to learn from: an empty `__init__.py`, a line of imports."""
FIRST_LINES = 5
"""Lines of a document that is short: nearly all end within 128 tokens."""
VOCABULARY = 1536
SHAPE = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4}
END = "<|endoftext|>"


def gather_documents(folder: Path, packages: Sequence[str], *, tests: bool = False) -> None:
    """Copy the Python files of packages into a folder, unless it is there: `PACKAGE/path/to/file.py`."""
    if folder.is_dir():
        return
    with replace_folder(folder) as new:
        for package in packages:
            root = root_of(package)
            for path in list_files(root, tests=tests):
                copy = new / package / path.relative_to(root)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


def cut_documents(source: Path, folder: Path, lines: int = FIRST_LINES) -> None:
    """Copy a folder's documents into another, the first lines of each, unless it is there."""
    if folder.is_dir():
        return
    with replace_folder(folder) as new:
        for path in sorted(source.rglob("*.py")):
            copy = new / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]))


def list_files(root: Path, *, tests: bool) -> Iterator[Path]:
    """Yield the Python files of a package's folder that are not too small, in the order of their paths.

    Its tests are left out unless they are wanted: many say nearly the same.
    """
    for path in sorted(root.rglob("*.py")):
        if path.stat().st_size >= LEAST_BYTES and (tests or not {"tests", "testing", "_tests"} & set(path.parts)):
            yield path


def root_of(package: str) -> Path:
    """Return the folder of an installed package, which is not imported.

    Raises:
        SystemExit: it is not installed.
    """
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"error: the package {package} is not installed; make install")
    return Path(next(iter(found.submodule_search_locations)))


def make_base_model(folder: Path) -> None:
    """Train a small Llama on `folder/read`, with a tokenizer of its own, into `folder/base`, unless it is there.

    It is a run of fedloom's own: `base.toml`, one client that trains all weights. One that was stopped goes on.
    """
    if (folder / "base").is_dir():
        return
    if not (folder / "untrained").is_dir():
        with replace_folder(folder / "untrained") as new:
            write_untrained(new, sorted((folder / "read").rglob("*.py")))
    recipe = folder / "base.toml"
    shutil.copyfile(HERE / "base.toml", recipe)
    trained = folder / "base-run"
    run(load_recipe(recipe), trained, resume=True)
    export(trained, folder / "base", merged=True)


def write_untrained(folder: Path, files: Sequence[Path]) -> None:
    """Write a Llama with random weights, and a tokenizer whose pieces are those of the files."""
    import torch
    from tokenizers.implementations import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    pieces = ByteLevelBPETokenizer()
    pieces.train([str(file) for file in files], vocab_size=VOCABULARY, special_tokens=[END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces._tokenizer, eos_token=END, pad_token=END)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=256, tie_word_embeddings=True, eos_token_id=0, bos_token_id=None,
        pad_token_id=0, **SHAPE,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
