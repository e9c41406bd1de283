"""A base model with an adapter on it, whose trained weights are one flat vector.

Letters: B sequences, T tokens, V vocabulary, P adapter parameters.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedloom.adapters.adapter import Adapter, Layout
from fedloom.adapters.files import load_adapter, save_adapter, save_model
from fedloom.adapters.lora import A_PARAMETER, ADAPTER_NAME, Residual, make_room_for_residuals
from fedloom.adapters.peft_config import reason_of
from fedloom.errors import ModelError
from fedloom.model.attention import MASKLESS, call_model, multiple_for
from fedloom.model.loss_head import LossHead
from fedloom.model.spreading import with_stand_ins
from fedloom.recipe.methods import SEEDS
from fedloom.seeds import derive_seed

PROMPT = "prompt_embeddings"
"""Name of a trained prompt in PEFT's files."""


class AdaptedModel:
    """Base model with an adapter whose trained weights, and their gradients, are flat vectors.

    `weights_P` is one parameter, `gradient_P` its gradient; the layers see views of both. Loading an adapter copies
    into `weights_P`, so the model is wrapped once and serves every client. `frozen` has the adapter's tensors that are
    not trained and the same for all clients: random projections of some methods, and LoRA's A with `freeze_a`, when
    only B is trained (FFA-LoRA, Sun et al. 2024, arXiv 2403.12313). With `residuals`, the adapted layers can take an
    adapter's residual.

    Without a `config` the adapter is the model: every weight is trained, and `tokenizer` is saved beside it. `base` may
    be on the meta device: then everything has a shape and nothing a value.

    Raises:
        ModelError: PEFT can't put this adapter on this model or would not save all that is trained, nothing would be
            trained, or it would be trained in 16 bits.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        config: PeftConfig | None,
        seed: int,
        *,
        freeze_a: bool = False,
        residuals: bool = False,
        tokenizer: Any = None,
    ) -> None:
        self.base = base
        self.num_base_parameters = sum(value.numel() for value in base.parameters())
        """Weights of the base model without the adapter, which PEFT puts into it."""
        self.config = config and _seeded(config, seed)
        self.model = _wrap(base, self.config, seed)
        # Left out, or "all-linear", they are what PEFT found: whoever opens the adapter may have other defaults.
        if self.config and (found := getattr(self.model.peft_config[ADAPTER_NAME], "target_modules", None)):
            self.config.target_modules = found
        self._tokenizer = tokenizer
        for name, value in self.model.named_parameters():
            if freeze_a and name.endswith(A_PARAMETER):
                value.requires_grad_(False)
        self._rooms = make_room_for_residuals(self.model) if residuals else {}
        self._residual: Residual | None = None
        self.give_back: Callable[[], bool] = lambda: False
        """Gives back memory that an engine keeps for its next round; False where there is none. For who runs short."""
        self.is_base = False
        """True inside `as_base`."""
        trained = [(name, value) for name, value in self.model.named_parameters() if value.requires_grad]
        saved = self._saved()
        # Reversed, so that a tensor with several names keeps the first.
        names = {id(value): name for name, value in reversed(saved.items())}
        if lost := [name for name, value in trained if id(value) not in names]:
            raise ModelError(
                f"PEFT would train {lost[0]} but not save it", where="[adapter]", mend="change the options"
            )
        if not trained:
            raise ModelError("nothing of this model would be trained", where="[adapter]", mend="name other targets")
        if coarse := [name for name, value in trained if value.dtype in (torch.bfloat16, torch.float16)]:
            raise ModelError(
                f"{coarse[0]} would be trained in bfloat16, whose 8 bits of mantissa lose steps as small as 1e-5",
                where="model.dtype",
                mend='use "float32"',
            )
        ours = {id(value) for _, value in trained}
        self.frozen = {name: value.detach() for name, value in saved.items() if id(value) not in ours}
        # PEFT saves a tensor that layers share under each of its names, transformers under the first.
        self._aliases = {
            name: names[id(value)]
            for name, value in saved.items()
            if config is not None and id(value) in ours and name != names[id(value)]
        }
        self.layout = Layout(
            names=tuple(names[id(value)] for _, value in trained), shapes=tuple(value.shape for _, value in trained)
        )
        self._places = {names[id(value)]: name for name, value in self.model.named_parameters() if id(value) in names}
        self._flatten(torch.cat([value.detach().reshape(-1) for _, value in trained]))
        plain = config is None or (
            config.peft_type == "LORA"
            # Of a variant, one looks at the tokens for the place from which on it is there.
            and not any(isinstance(layer, LoraLayer) and layer.lora_variant for layer in base.modules())
        )
        self.unpads = plain and base.config._attn_implementation == MASKLESS
        """True where the real tokens of a batch may be computed alone (`without_padding`)."""
        self.row_multiple = multiple_for(base.device, base.dtype)
        """Number of which such tokens are to be a multiple."""
        # A prompt is put before the tokens by PEFT's model, which the base model taken apart would leave out.
        self.loss_head = LossHead(base, self.logits if self.has_prompt else None)

    def _flatten(self, weights_P: Tensor) -> None:
        """Make the model's trained parameters, and their gradients, views of two vectors, the first of which is given.

        They must be changed in place: a new `.data` or `.grad` of a parameter would cut it off.
        """
        self.weights_P = nn.Parameter(weights_P)
        self.gradient_P = torch.zeros_like(self.weights_P)
        self.weights_P.grad = self.gradient_P
        weights, gradients = self.layout.split(self.weights_P.data), self.layout.split(self.gradient_P)
        for name in self.layout.names:
            value = self.parameter(name)
            value.data, value.grad = weights[name], gradients[name]

    def to_empty(self, device: torch.device) -> None:
        """Give a model on the meta device memory on another one, with whatever values lie there."""
        self.model.to_empty(device=device)
        self.base.tie_weights()  # each name of a shared tensor has got its own
        self._flatten(torch.empty(self.weights_P.shape, dtype=self.weights_P.dtype, device=device))

    @property
    def device(self) -> torch.device:
        """Return the device that the trained weights are on."""
        return self.weights_P.device

    @property
    def is_whole(self) -> bool:
        """Return whether the adapter is the model itself."""
        return self.config is None

    @property
    def has_prompt(self) -> bool:
        """Return whether trained tokens stand before those of the text."""
        return self.config is not None and bool(self.config.is_prompt_learning)

    @property
    def prompt_length(self) -> int:
        """Return how many trained tokens stand before those of the text."""
        return int(self.config.num_virtual_tokens) if self.config is not None and self.has_prompt else 0

    @property
    def outer(self) -> Any:
        """Return the model for transformers' own code: PEFT's where it puts a prompt before the text, else the base.

        The base has every other adapter inside it.
        """
        return self.model if self.has_prompt else self.base

    @property
    def tensors(self) -> list[Tensor]:
        """Return all tensors that the model computes with, of a residual too."""
        factors = (factor for room in self._rooms.values() for factor in room.factors or ())
        return [*self.model.parameters(), *self.model.buffers(), *factors]

    @property
    def num_parameters(self) -> int:
        """Return how many weights the base model and the adapter have together."""
        return sum(value.numel() for value in self.model.parameters())

    def logits(self, tokens_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Return the logits of the given tokens, [B, T, V]; those of a trained prompt before them are cut off."""
        logits: Tensor = call_model(self.model, tokens_BT, mask_BT).logits
        return logits[:, -tokens_BT.shape[1] :]

    def parameter(self, name: str) -> Tensor:
        """Return the model's parameter that has this name in the saved files."""
        found: Tensor = self.model.get_parameter(self._places[name])
        return found

    def load(self, adapter: Adapter) -> None:
        """Copy an adapter's weights, and its residual, into the model."""
        assert adapter.layout == self.layout, "an adapter of another model"
        self.weights_P.data.copy_(adapter.weights_P)
        self.load_residual(adapter)

    def load_residual(self, adapter: Adapter) -> None:
        """Let the layers add the residual of an adapter; nothing, if it has none."""
        # What is there already stays where it is: steps that a GPU recorded read it at the place that it had then, and
        # clients are scored in between.
        if adapter.residual is self._residual:
            return
        self._residual = adapter.residual
        for layer, room in self._rooms.items():
            room.load(adapter.residual.factors[layer] if adapter.residual else None, self.device)

    def draw(self, seed: int) -> Adapter:
        """Return the LoRA adapter that a run with another seed starts from; the model's own stays as it is."""
        with torch.random.fork_rng(devices=[]), with_stand_ins(self.base):
            torch.manual_seed(derive_seed(seed, "adapter"))
            self.model.add_adapter("drawn", copy.deepcopy(self.config))
        places = [self._places[name].replace(f".{ADAPTER_NAME}.", ".drawn.") for name in self.layout.names]
        drawn = [self.model.get_parameter(place) for place in places]
        weights_P = torch.cat([value.detach().reshape(-1) for value in drawn]).cpu()
        self.model.delete_adapter("drawn")
        return Adapter(self.layout, weights_P)

    def read(self) -> Adapter:
        """Return a copy of the weights that are in the model now."""
        return Adapter(self.layout, self.weights_P.detach().to("cpu", copy=True))

    def lend(self) -> Adapter:
        """Return the weights that are in the model now, valid until they change.

        A whole model on a processor lends its own memory, as a copy would be as large as the model.
        """
        return Adapter(self.layout, self.weights_P.detach().cpu()) if self.is_whole else self.read()

    @contextmanager
    def as_base(self, start: Adapter, then: Adapter) -> Iterator[None]:
        """Be the base model inside the block, and have the weights of `then` behind it.

        `start` is what training began with: of a whole model that is the base model, and it has no residual.
        """
        self.load(start)
        before, self.is_base = self.is_base, True
        # PEFT switches gradients off with the adapter, and on again for all of it: for what is frozen in it too.
        learning = [(value, value.requires_grad) for value in self.model.parameters()]
        try:
            with nullcontext() if self.is_whole else self.model.disable_adapter():
                yield
        finally:
            self.is_base = before
            for value, learns in learning:
                value.requires_grad_(learns)
            self.load(then)

    def save(self, adapter: Adapter, folder: Path, card: str = "") -> None:
        """Write an adapter for PEFT to open, or a whole model for transformers; `card` becomes its README."""
        if self.config is not None:
            tensors = self.layout.split(adapter.weights_P)
            shared = {name: tensors[first] for name, first in self._aliases.items()}
            save_adapter(adapter, self.config, folder, frozen={**self.frozen, **shared}, card=card)
        else:
            save_model(adapter, self.base, folder, frozen=self.frozen, tokenizer=self._tokenizer, card=card)

    def open(self, folder: Path) -> Adapter:
        """Read an adapter for this model that `save`, PEFT or transformers wrote.

        Raises:
            ModelError: there is none, it can't be read, or it belongs to another model.
        """
        return load_adapter(folder, self.layout, {*self.frozen, *self._aliases})

    def _saved(self) -> dict[str, Tensor]:
        """Return what belongs into the adapter's file: name there -> the model's own tensor."""
        # `keep_vars` gives the parameters themselves, which are told apart by identity.
        own: dict[str, Tensor] = self.model.state_dict(keep_vars=True)
        if self.config is None:
            return own
        if self.has_prompt:
            # PEFT saves the finished prompt. With one parameter, that is the prompt; with more, a network makes it
            # from what is trained, which PEFT would not save.
            prompt = [value for name, value in own.items() if name.startswith("prompt_encoder.")]
            return {PROMPT: prompt[0]} if len(prompt) == 1 else {}
        with warnings.catch_warnings():
            # PEFT gives advice about saving; here the constructor checks that all that is trained is saved.
            warnings.simplefilter("ignore")
            saved: dict[str, Tensor] = get_peft_model_state_dict(
                self.model, state_dict=own, save_embedding_layers=False
            )
        return saved


def _seeded(config: PeftConfig, seed: int) -> PeftConfig:
    """Return a copy whose random, untrained parts come from the recipe's seed: they are the same on every client."""
    seeded = copy.deepcopy(config)
    for field in SEEDS:
        if hasattr(seeded, field):
            setattr(seeded, field, derive_seed(seed, field) % 2**31)
    return seeded


def _wrap(base: PreTrainedModel, config: PeftConfig | None, seed: int) -> Any:
    """Return the base model inside PEFT's model, or the base model itself with every weight trained."""
    if config is None:
        return base.requires_grad_(True)
    # Inside this device, PEFT's new weights are on it from the start, and take neither memory nor time.
    place = torch.device("meta") if base.device.type == "meta" else nullcontext()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), place, with_stand_ins(base):
        # Libraries warn about each other, and PEFT about merging tied heads, which is not done here.
        warnings.simplefilter("ignore")
        # PEFT draws on the CPU, so the same seed gives the same adapter on every device.
        torch.manual_seed(derive_seed(seed, "adapter"))
        try:
            # A copy: PEFT writes into the configuration that it is given.
            return get_peft_model(base, copy.deepcopy(config))
        # Each of PEFT's methods finds in its own way what it can't do, with errors of any kind.
        except Exception as error:
            raise ModelError(
                f"PEFT can't put {config.peft_type.value.lower()} on this model: {reason_of(error)}",
                where="[adapter]",
                mend="change its targets or options, or choose another method",
            ) from error
