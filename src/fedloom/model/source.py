"""Sources of a base model: a hub, a folder, a GGUF file, an installed package, or random weights.

Only safetensors, GGUF and JSON are read here, no pickle and no remote code. A GGUF file is unpacked once and kept as
safetensors, because unpacking takes tens of seconds and loading takes one. `conversion` has what becomes of pickles.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PretrainedConfig

from fedloom.downloads import fetch_description, parts_of
from fedloom.errors import ModelError
from fedloom.host.files import hash_file, replace_folder
from fedloom.host.machine import cache_folder
from fedloom.hub import COMMIT, Snapshot, find_cached, find_model, has_safetensors, hub_address, mend_for
from fedloom.model.conversion import INDEX, PICKLE, Weights, find_weights, weights_of_folder

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""Endings of weights that are pickles: programs, not data."""

SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "opt-350m": lambda: transformers.OPTConfig(
        hidden_size=1024,
        ffn_dim=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        word_embed_proj_dim=512,
        do_layer_norm_before=False,
    ),
    "smollm2-135m": lambda: transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    ),
    "tiny-opt": lambda: transformers.OPTConfig(
        vocab_size=260,
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=64,
        max_position_embeddings=256,
    ),
    "tiny-llama": lambda: transformers.LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    ),
    "tiny-gpt2": lambda: transformers.GPT2Config(
        vocab_size=260, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=256, eos_token_id=256
    ),
}
"""Shapes that `random:NAME` builds: real ones for speed and counts, tiny ones for tests."""


@dataclass(frozen=True)
class ModelSource:
    """Place that a base model comes from, opened so far that its shape and its tokenizer are known."""

    name: str
    """`model.source` of the recipe."""
    revision: str
    """Commit on a hub; elsewhere a short text that says what kind of source it is."""
    config: PretrainedConfig
    tokenizer: Any
    location: str
    """Folder or hub id that the weights are read from; empty if they are random."""
    file: Path | None = None
    """GGUF file that the folder was unpacked from."""
    weights: Weights | None = None
    """Weights that lie elsewhere than the configuration: a conversion of pickles, or what the recipe names."""
    generation: GenerationConfig | None = None
    """Settings for writing text, of a model whose weights lie elsewhere; None if it has none."""

    @property
    def max_length(self) -> int | None:
        """Return the longest sequence that the model has positions for, or None if its configuration does not say."""
        # XLNet says -1 for a length without a limit.
        found = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return found if found is None or found > 0 else None

    @property
    def num_layers(self) -> int:
        """Return how many layers the decoder has."""
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def vocabulary_size(self) -> int:
        """Return how many rows the embedding has."""
        return int(self.config.get_text_config().vocab_size)


def open_model(
    source: str,
    revision: str | None = None,
    say: Callable[[str], object] = str,
    *,
    weights_revision: str | None = None,
    convert: bool = False,
) -> ModelSource:
    """Find a base model and read its configuration and tokenizer, not its weights; `say` is told about slow work.

    `weights_revision` is where the weights of a hub model are, if not at its `revision`. With `convert`, weights that
    there are only as pickles are converted.

    Raises:
        ModelError: there is no such model, it can't be had, or it is refused: a pickle, damaged, or no tokenizer.
    """
    transformers.utils.logging.disable_progress_bar()
    found = _open_local(source, convert, say)
    if found is None:
        return _open_hub(source, revision, weights_revision, convert, say)
    for key, value in {"model.revision": revision, "model.weights_revision": weights_revision}.items():
        if value is not None:
            raise ModelError("only a hub model has revisions", where=key, mend="leave it out")
    return found


def _open_local(source: str, convert: bool, say: Callable[[str], object]) -> ModelSource | None:
    """Return the model if the source is anything but a hub id, else None."""
    scheme, _, rest = source.partition(":")
    if scheme == "random":
        if rest not in SHAPES:
            raise ModelError(f'no shape "{rest}"', where="model.source", mend=f"known: {', '.join(SHAPES)}")
        return ModelSource(source, "fixed random weights", SHAPES[rest](), byte_tokenizer(), location="")
    try:
        path = _find_in_package(rest) if scheme == "package" else Path(source).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError("not a possible path", where=f'model.source = "{source[:80]}"') from error
    if is_file and path.suffix == ".gguf":
        folder, digest = unpack_gguf(path, say)
        return replace(_read_folder(source, f"sha256 {digest[:16]}", folder), file=path)
    if is_folder:
        found = _read_folder(source, "local folder", path)
        if _has_weights(path):
            return found
        weights = weights_of_folder(source, path, convert, say)
        return replace(found, weights=weights, generation=_read_generation(str(path)))
    if scheme == "package" or path.suffix == ".gguf" or path.is_absolute() or source.startswith((".", "~")):
        raise ModelError(f"no such model file or folder: {path}", where="model.source", mend="check the path")
    return None


def byte_tokenizer() -> Any:
    """Build a tokenizer of 256 bytes and one special token, without any download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "<|end|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def unpack_gguf(path: Path, say: Callable[[str], object] = str) -> tuple[Path, str]:
    """Return the folder with the GGUF file's model as safetensors, unpacked on first use, and the file's SHA-256.

    The folder is made under a temporary name and renamed when it is complete.

    Raises:
        ModelError: transformers can't unpack the file, or the cache can't be written to.
    """
    digest = hash_file(path)
    # Another version of transformers may unpack the same file otherwise.
    folder = cache_folder() / "gguf" / f"{path.stem}-{digest[:16]}-transformers-{transformers.__version__}"
    if folder.is_dir():
        return folder, digest
    say(f"unpacking {path.name} into {folder.parent}, once: about half a minute")
    try:
        with replace_folder(folder, existing="keep") as temporary:
            _unpack(path, temporary, folder.parent)
    except OSError as error:
        raise ModelError(
            f"the cache can't be written to ({error.strerror})", where=str(folder.parent), mend="set FEDLOOM_CACHE"
        ) from error
    return folder, digest


def _unpack(path: Path, folder: Path, cache: Path) -> None:
    """Write the model of a GGUF file into a folder.

    Raises:
        ModelError: transformers can't unpack it.
    """
    try:
        # Transformers shows a progress bar here that no setting turns off.
        with contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(**gguf_arguments(path), dtype=torch.float32)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    # A damaged file can fail anywhere in the reader, with errors of any kind.
    except Exception as error:
        raise ModelError(
            f"not a GGUF model that transformers can read, or no room to unpack it ({type(error).__name__})",
            where=str(path),
            mend=f"try another file, and check that {cache} has free space",
        ) from error


def gguf_arguments(path: Path) -> dict[str, Any]:
    """Return the arguments with which transformers reads a GGUF file's model, unpacked."""
    # Kept packed, the weights would be unpacked again in every forward pass.
    unpacked = transformers.GgufConfig(dequantize=True)
    return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "quantization_config": unpacked}


def _find_in_package(rest: str) -> Path:
    """Find the file of NAME/FILE inside the installed package NAME, without importing it.

    Raises:
        ModelError: there is no such package, or the path leads out of it.
    """
    package, _, file = rest.partition("/")
    where = "model.source"
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f'no installed package "{package}"', where=where, mend=f"install the package {package}")
    root = Path(spec.submodule_search_locations[0]).resolve()
    path = (root / file).resolve()
    if not path.is_relative_to(root):
        raise ModelError(f'"{file}" leads out of the package {package}', where=where, mend="name a file inside it")
    return path


def _read_folder(name: str, revision: str, folder: Path) -> ModelSource:
    with loading(name):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        _check_tokenizer(tokenizer)
        _check_weights(folder)
    return ModelSource(name, revision, config, tokenizer, location=str(folder))


def _open_hub(
    name: str, revision: str | None, weights_revision: str | None, convert: bool, say: Callable[[str], object]
) -> ModelSource:
    found: Snapshot | None = None
    refused: Exception | None = None
    try:
        found = find_model(name, revision)
    # Asking a hub fails with a dozen kinds of error; with each of them the local cache may still have the model.
    except Exception as error:
        refused = error
    commit = found.commit if found else revision or "main"
    options = {"trust_remote_code": False, "local_files_only": found is None}
    if found:
        fetch_description(name, commit, say)
    try:
        with loading(name):
            config = AutoConfig.from_pretrained(name, revision=commit, **options)
            commit = getattr(config, "_commit_hash", None) or commit
            tokenizer = AutoTokenizer.from_pretrained(name, revision=commit, **options)
            _check_tokenizer(tokenizer)
    except ModelError as error:
        if found:
            raise
        raise ModelError(
            f"the model can't be found: {name} is no folder here, is not complete in the local cache, and asking"
            f" {hub_address()} failed ({type(refused).__name__ if refused else 'HF_HUB_OFFLINE is set'})",
            where="model.source",
            mend=mend_for(refused)
            or "check the name and the network, or set model.source to a folder or .gguf file with the model",
        ) from error
    source = ModelSource(name, commit, config, tokenizer, location=name)
    weights = (
        _weights_at(name, weights_revision, online=found is not None)
        if weights_revision
        else find_weights(name, found or find_cached(name, commit), online=found is not None, convert=convert, say=say)
    )
    if weights is None:
        return source
    return replace(source, weights=weights, generation=_read_generation(name, commit, local=found is None))


def _weights_at(name: str, revision: str, *, online: bool) -> Weights:
    """Return the weights at a revision that the recipe names, by its commit."""
    if online and not COMMIT.fullmatch(revision):
        with loading(name):
            found = find_model(name, revision)
        revision = found.commit if found else revision
    return Weights(name, revision, {"commit": revision})


def _read_generation(location: str, revision: str = "main", *, local: bool = False) -> GenerationConfig | None:
    """Read the settings for writing text, which transformers looks for beside the weights; None if there are none."""
    try:
        return GenerationConfig.from_pretrained(location, revision=revision, local_files_only=local)
    except OSError:
        return None


def _check_tokenizer(tokenizer: Any) -> None:
    # Transformers makes an empty tokenizer of a folder without tokenizer files, and says nothing.
    if len(tokenizer) < 2:
        raise ValueError("it has no tokenizer")


def _check_weights(folder: Path) -> None:
    """Refuse weights that are incomplete, cut off, or pickles that can't be converted, by the names of their files."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    elif index.is_file():
        files = [folder / name for name in parts_of(index)]
    elif not _has_weights(folder):
        return
    elif pickles := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES):
        raise ValueError(f"{pickles[0]} is a pickle, which could run code and is never opened; save it as safetensors")
    else:
        raise ValueError("it has no model.safetensors")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file.name} is missing")
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError:
            raise ValueError(f"{file.name} is damaged or cut off") from None


def _has_weights(folder: Path) -> bool:
    """Return whether a folder need not be asked for pickles that can be converted, by the names of its files."""
    names = {path.name for path in folder.iterdir() if path.is_file()}
    return has_safetensors(names) or names.isdisjoint((PICKLE, INDEX))


@contextlib.contextmanager
def loading(name: str, mend: str = "") -> Iterator[None]:
    """Turn any error of a library that loads a model into one ModelError, and keep its warnings off the screen."""
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    try:
        yield
    # The files come from strangers and may fail in the libraries with errors of any kind.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the model can't be loaded: {reason[:200]}",
            where=f'model.source = "{name}"',
            mend=mend
            or mend_for(error)
            or "it must be a causal language model of transformers' own (a model's own code is never run), with whole"
            " safetensors weights and a tokenizer",
        ) from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
