"""What is done with a run's adapter afterwards: hand it on, proven to be the same, or let it write."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, TextStreamer

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.errors import ModelError, RunError
from fedloom.hub import COMMIT
from fedloom.model.attention import choose_attention
from fedloom.model.source import ModelSource, open_model
from fedloom.monitoring.display import Display
from fedloom.preparation import load_adapted_model, load_base, prepare
from fedloom.recipe.loading import load_recipe
from fedloom.recipe.recipe import Recipe
from fedloom.records.run import read_run
from fedloom.text import show_controls

PROOF_BLOCKS = 4
"""Hold-out blocks on which what was written must give the run's own logits."""
TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 5e-2}
"""Of a merged model's logits, relative to their norm: W + BA rounds otherwise than W and BA apart."""


def export(
    folder: str | Path, to: str | Path, *, merged: bool = False, which: str = "best", display: Display | None = None
) -> float:
    """Copy a run's adapter, or write the base model with it merged in, and prove it by its logits.

    Returns the distance of the logits of what was written from the run's, relative to their norm, on a few hold-out
    blocks: 0.0 for a copied adapter.

    Raises:
        RunError: no such run or adapter, the target exists, or what was written is not the same.
    """
    display = display or Display()
    folder, to = Path(folder), Path(to)
    recipe = _recipe_of(folder)
    source = _adapter_folder(folder, which)
    if to.exists():
        raise RunError("the target exists", where=str(to), mend="name another with --to, or remove it")
    prepared = prepare(recipe, display)
    display.show_step("weights", prepared.source.name)
    adapted = load_adapted_model(recipe, prepared.source)
    adapter = adapted.open(source)
    adapted.load(adapter)
    held_out = (prepared.central, *(client.holdout for client in prepared.clients))
    blocks = next(blocks for blocks in held_out if len(blocks))
    tokens_BT = blocks.tokens_NT[:PROOF_BLOCKS].to(adapted.device)
    expected = _logits(adapted.model, tokens_BT)

    to.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{to.name}-", dir=to.parent))
    written = temporary / to.name
    try:
        display.show_step("writing", str(to))
        if merged and not adapted.is_whole:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of libraries about each other
                _merge(adapted, recipe, prepared.source, source).save_pretrained(written)
            prepared.source.tokenizer.save_pretrained(written)
        else:
            shutil.copytree(source, written)
        if merged or adapted.is_whole:
            opened = _open_merged(written, expected.dtype, adapted.device)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of PEFT about layers that it knows less well
                opened = PeftModel.from_pretrained(load_base(recipe, prepared.source), written)
        display.show_step("proof", f"logits of {len(tokens_BT)} hold-out blocks")
        found = _logits(opened, tokens_BT)
        distance = float((found - expected).norm() / expected.norm())
        rounds_otherwise = (merged and not adapted.is_whole) or adapter.residual is not None
        if not distance <= (TOLERANCES[prepared.plan.dtype] if rounds_otherwise else 0.0):
            raise RunError(
                f"what was written is not the run's adapter: its logits lie {distance:.1e} apart", where=str(to)
            )
        written.rename(to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return distance


def generate(
    folder: str | Path,
    prompt: str,
    *,
    base: bool = False,
    max_new_tokens: int = 80,
    which: str = "best",
    say: Callable[[str], object] | None = None,
) -> None:
    """Write on from a prompt with a run's adapter, likeliest token first; with `base`, first without it.

    Raises:
        RunError: no such run or adapter.
    """
    folder, say = Path(folder), say or _print
    recipe = _recipe_of(folder)
    source = _adapter_folder(folder, which)
    opened = open_model(recipe.model.source, recipe.model.revision)
    adapted = load_adapted_model(recipe, opened)
    inputs = opened.tokenizer(prompt, return_tensors="pt")["input_ids"].to(adapted.device)
    if inputs.shape[1] == 0:
        raise RunError("the prompt is empty", where="PROMPT", mend="give it a word or more")
    longest = opened.max_length
    room = max_new_tokens if longest is None else min(max_new_tokens, longest - inputs.shape[1] - adapted.prompt_length)
    if room < 1:
        raise RunError(f"the prompt has {inputs.shape[1]} tokens, the model has room for {longest}", where="PROMPT")
    adapted.model.eval()

    def write() -> None:
        streamer = _Streamer(opened.tokenizer, say)
        padding = opened.tokenizer.pad_token_id or opened.tokenizer.eos_token_id
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transformers about itself
            adapted.model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=room,
                do_sample=False,
                pad_token_id=padding,
                streamer=streamer,
            )

    if base:
        say("--- base model ---\n")
        # A whole model is still the base model: what was trained is not loaded yet.
        with nullcontext() if adapted.is_whole else adapted.model.disable_adapter():
            write()
        say("--- with the adapter ---\n")
    adapted.load(adapted.open(source))
    write()


def _print(text: str) -> None:
    """What a model writes could be a terminal's escape sequence."""
    print(show_controls(text), end="", flush=True)


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Tells each piece of text as soon as it is whole."""

    def __init__(self, tokenizer: object, say: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._say(text + ("\n" if stream_end else ""))


def _recipe_of(folder: Path) -> Recipe:
    """What was asked for, at the commits that the run had: a hub's main branch may have moved on."""
    run = read_run(folder)
    commits = {"model.revision": run.plan.get("model_revision", ""), "data.revision": run.plan.get("data_revision", "")}
    pinned = [f'{key}="{commit}"' for key, commit in commits.items() if COMMIT.fullmatch(commit)]
    return load_recipe(run.folder / "recipe.toml", pinned)


def _adapter_folder(folder: Path, which: str) -> Path:
    source = folder / "adapters" / which
    if not source.is_dir():
        raise RunError(f'no adapter "{which}"', where=str(folder), mend="its first round is not complete")
    return source


def _merge(adapted: AdaptedModel, recipe: Recipe, model: ModelSource, source: Path) -> PreTrainedModel:
    """The base model with the adapter in its weights.

    Raises:
        RunError: PEFT can't do that for this method.
    """
    if recipe.model.quantization:
        raise RunError("packed weights can't take an adapter in", where="--merged", mend="leave it out")
    merging = adapted.model
    if recipe.federation.lora_rule == "fedex":  # whose residual stands beside the layers: PEFT's file has all in one
        merging = PeftModel.from_pretrained(load_base(recipe, model), source)
    try:
        return merging.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise RunError(
            f"PEFT can't merge {recipe.adapter.method} into the model's weights", where="--merged", mend="leave it out"
        ) from error


def _open_merged(folder: Path, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # of any kind: it is transformers' own writing that it can't read
        raise ModelError(f"what was written can't be read: {type(error).__name__}", where=str(folder)) from error
    model.set_attn_implementation(choose_attention(model.config))
    opened: torch.nn.Module = model.to(device).eval()
    return opened


@torch.inference_mode()
def _logits(model: torch.nn.Module, tokens_BT: Tensor) -> Tensor:
    logits: Tensor = model.eval()(input_ids=tokens_BT, use_cache=False).logits
    return logits
