"""Memory that a training step needs, and how many clients fit at once in what there is.

Traced, not guessed from the shape: the very step that will run is run on tensors that have shapes and no memory, and
what is alive at each moment is added up. That takes a while for each layer, and layers are alike: two short models
tell what a layer adds.

Letters: K clients, L layers, B sequences, T tokens, P adapter parameters.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.stacked_lora import Stack
from fedloom.errors import ModelError
from fedloom.host.machine import free_memory
from fedloom.model.loss_head import rows_at_a_time
from fedloom.text import format_bytes
from fedloom.training.stacked_step import Noise, StackedStep, StepInputs
from fedloom.training.stretches import STRETCH, line_bytes

if TYPE_CHECKING:
    from fedloom.recipe.training_section import Training

HELD_BY_ALLOCATOR = {"cpu": 1.45, "cuda": 1.1}
"""Bytes that a process holds for each byte alive in a step: glibc keeps freed pieces, 1.3 to 1.5 times as much in all
(docs/benchmarks.md). Told to give them back at once, it holds exactly what is alive, and steps take a quarter
longer. On a GPU, torch rounds sizes up and can't use every gap."""
HELD_BESIDE = {"cpu": 0, "cuda": 2**29}
"""Bytes that a step needs which are in no tensor: workspaces of cuBLAS and attention, and the recording itself."""
WORTHWHILE_ON_CPU = 5 * 2**30
"""Bytes of all clients at once: beyond it, a processor waits for its memory (docs/benchmarks.md, K = 32)."""
MOST_ON_CPU = 64
"""Clients at once beyond which a processor gains nothing by more, which only take memory (docs/benchmarks.md)."""
SHARE_OF_FREE = 0.9
"""Share of the free memory that a run may take: the rest is for the allocator and everybody else."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step: of the base model, of what does not grow with the clients, and of each client."""

    base_bytes: int
    fixed_bytes: int
    client_bytes: int
    scoring_bytes: int = 0
    """Bytes of an evaluation, which may be made while clients are under way."""
    held_bytes: int = 0
    """Bytes that each of these clients holds meanwhile; 0 where no evaluation was asked about."""

    def peak_bytes(self, clients: int) -> int:
        """Return the bytes at the peak with so many clients at once, whether they take a step or are scored."""
        step, scoring = self.fixed_bytes + clients * self.client_bytes, self.scoring_bytes + clients * self.held_bytes
        return self.base_bytes + max(step, scoring)

    def clients_that_fit(self, free_bytes: int) -> int:
        """Return how many clients fit in free memory beside the base model: at least one, which may be too many."""
        left = SHARE_OF_FREE * free_bytes - self.base_bytes
        fit = (left - self.fixed_bytes) // self.client_bytes
        if self.held_bytes:
            fit = min(fit, (left - self.scoring_bytes) // self.held_bytes)
        return max(1, int(fit))

    def clients_worthwhile(self, device: torch.device) -> int:
        """Return the number of clients beyond which more at once would only be slower; on a GPU there is none."""
        most = most_worthwhile(device)
        return most if device.type == "cuda" else max(1, min(most, WORTHWHILE_ON_CPU // self.client_bytes))


def most_worthwhile(device: torch.device) -> int:
    """Return the number of clients beyond which more at once gain nothing, however small they are."""
    return sys.maxsize if device.type == "cuda" else MOST_ON_CPU


def of_all_layers(trace: Callable[[int], tuple[int, ...]], layers: int, *, alike: bool) -> tuple[int, ...]:
    """Return what a model of so many layers takes at several moments, told from two short ones where all are `alike`.

    `trace` tells it of a model of a number of layers.
    """
    if layers <= 3 or not alike:
        return trace(layers)
    return tuple(two + (layers - 2) * (three - two) for two, three in zip(trace(2), trace(3), strict=True))


def predict_step(
    build: Callable[[int], AdaptedModel],
    layers: int,
    training: Training,
    *,
    clients: int,
    length: int,
    device: torch.device,
    scored_tokens: int = 0,
    alike: bool = True,
    packed: bool = False,
    private: bool = False,
) -> StepMemory:
    """Predict what a step of `training.batch_size` sequences of `length` tokens a client needs, with `clients` or more.

    And what it takes to score the clients' adapters in batches of `scored_tokens`, where they are.

    `build` makes the adapted model on the meta device with a number of layers; the one asked about has `layers`. Where
    they are not `alike`, because some are adapted and others not, all of them are traced. With `packed`, texts share
    a sequence; with `private`, each sequence has a gradient of its own.
    """
    whole = build(layers)
    # From a full chunk of logits on, every client adds the same to what the loss needs; before that, less.
    full = -(-rows_at_a_time(whole.loss_head.vocabulary_size, device) // (training.batch_size * length))
    few = min(clients, full)

    def peak(clients: int) -> int:
        def trace(count: int) -> tuple[int]:
            return (trace_step(build(count), training, clients, length, device, packed=packed, private=private),)

        (found,) = of_all_layers(trace, layers, alike=alike)
        return found

    at_few, one_more = (round(HELD_BY_ALLOCATOR[device.type] * peak(clients)) for clients in (few, few + 1))
    client_bytes = one_more - at_few
    fixed_bytes = at_few - few * client_bytes + HELD_BESIDE[device.type]
    step = StepMemory(base_bytes(whole), fixed_bytes, client_bytes)
    if not scored_tokens:
        return step
    # Nothing of a layer is kept for the next one, so that two are as good as all.
    scored = build(min(2, layers) if alike else layers)
    scoring_bytes = round(HELD_BY_ALLOCATOR[device.type] * trace_scoring(scored, scored_tokens, length, device))
    if device.type == "cuda":
        # What a recorded step takes stays taken while the recording is there.
        return replace(step, scoring_bytes=fixed_bytes + scoring_bytes, held_bytes=client_bytes)
    held_bytes = ROWS_HELD * whole.weights_P.numel() * whole.weights_P.element_size()
    return replace(step, scoring_bytes=scoring_bytes, held_bytes=held_bytes)


ROWS_HELD = 7
"""Times its adapter's weights that a client has in memory while clients are scored: as they are, began and are to
change, two moments of its optimizer, the update that waits, and the place in the pass."""


CERTAIN_TIMES = 4
"""Times the rough count below that must be free for a step to be certain to fit (a test holds it to the trace)."""


def leaves_no_doubt(
    adapted: AdaptedModel,
    training: Training,
    *,
    clients: int,
    length: int,
    scored_tokens: int,
    device: torch.device,
    free: int,
) -> bool:
    """Return whether so many clients train at once, and are scored, in memory that is free, without tracing a step."""
    count = count_roughly(adapted, training, clients, length, scored_tokens, device)
    if count is None:
        return False
    needed = CERTAIN_TIMES * count
    if device.type == "cpu" and needed > WORTHWHILE_ON_CPU:
        return False  # fewer at once may be faster, and the trace says how many
    return base_bytes(adapted) + needed <= SHARE_OF_FREE * free


def count_roughly(
    adapted: AdaptedModel, training: Training, clients: int, length: int, scored_tokens: int, device: torch.device
) -> int | None:
    """Return a rough count of the bytes of a step, or of scoring where that takes more, beside the base model.

    None where a configuration does not say its shape. Activations have 4 bytes each: 34 H + 5 A T of a token in a layer
    with H features and A heads (Korthikanti et al. 2022, arXiv 2205.05198, section 4), with the width of the MLP where
    it is wider than 4 H, and four copies of the logits. Scoring keeps nothing of a layer for the next one.
    """
    config = adapted.base.config.get_text_config()
    names = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    shape: list[Any] = [getattr(config, name, None) for name in names]
    if not all(isinstance(size, int) for size in shape):
        return None
    features, heads, layers, vocabulary = shape
    wide = max(4 * features, getattr(config, "intermediate_size", None) or 0)
    layer = 26 * features + 2 * wide + 5 * heads * length
    # Inputs and outputs of the adapted layers' factors: with a rank above the features, they are the most.
    factors = 2 * sum(sum(shape) for shape in adapted.layout.shapes)
    step = clients * training.batch_size * length * (layers * layer + 4 * vocabulary + factors)
    rows = min(scored_tokens, rows_at_a_time(vocabulary, device)) if adapted.loss_head.is_apart else scored_tokens
    scoring = scored_tokens * (layer + factors) + rows * 4 * vocabulary
    # Weights, gradient, start, mask and two moments of each client's adapter, in float32, and some in float64.
    adapters = 40 * clients * adapted.layout.size
    return int(4 * max(step, scoring) + adapters)


def base_bytes(adapted: AdaptedModel) -> int:
    return sum(value.numel() * value.element_size() for value in {*adapted.model.parameters()})


def trace_step(
    adapted: AdaptedModel,
    training: Training,
    clients: int,
    length: int,
    device: torch.device,
    *,
    packed: bool = False,
    private: bool = False,
    fixed: bool | None = None,
) -> int:
    """Return the most bytes that a step has alive beside the base model; `adapted`, on the meta device, is used up.

    `fixed` says whether shapes are, and steps come in stretches, as on a GPU.
    """
    # A model that can't be traced is the caller's to deal with; torch would print its own traceback of it as well.
    logging.getLogger(FakeTensorMode.__module__).setLevel(logging.CRITICAL)
    with FakeTensorMode(allow_non_fake_inputs=True):
        adapted.model.to_empty(device=device)
        base = [*adapted.model.parameters(), *adapted.model.buffers()]
        with LiveBytes(base) as live:
            stack, max_norm = Stack(adapted), 1.0 if private else None
            slots = StackedStep(adapted, stack, training, clients, device, max_norm=max_norm)
            slots.use_slots(clients)
            positions = torch.arange(clients * training.batch_size * length, device=device)
            # With fixed shapes every position is computed, and none is looked up. How much a row leaves out, only texts
            # say; it is more than what attention spreads (a test holds it), but for the places of its tokens.
            fixed = device.type == "cuda" if fixed is None else fixed
            inputs = StepInputs(
                tokens_NT=positions.view(-1, length),
                keys_N=positions[: clients * training.batch_size],
                rows_M=None if fixed else positions,
                targets_M=positions,
                clients_M=None if fixed else positions,
                shares_M=positions.to(slots.weights_KP.dtype),
                rates_K=torch.zeros(clients, dtype=torch.float64, device=device),
                mus_K=torch.zeros(clients, dtype=torch.float64, device=device),
                mask_NT=positions.view(-1, length) if packed else None,
            )
            line = line_bytes(inputs._replace(real_R=positions) if adapted.unpads else inputs)
            lines = torch.empty(STRETCH * line if fixed else 0, dtype=torch.uint8, device=device)
            noise = torch.zeros_like(slots.weights_KP, dtype=torch.float64)
            batches_K = torch.ones(clients, dtype=torch.int64, device=device)
            slots.accumulate([inputs], Noise(noise, batches_K) if private else None)
            del lines  # which were there all the time
    return int(live.peak)


def trace_scoring(adapted: AdaptedModel, tokens: int, length: int, device: torch.device) -> int:
    """Return the most bytes that the scoring of so many tokens has alive beside the base model and clients' adapters.

    `adapted`, on the meta device, is used up.
    """
    logging.getLogger(FakeTensorMode.__module__).setLevel(logging.CRITICAL)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        adapted.model.to_empty(device=device)
        stack, weights_1P = Stack(adapted), torch.zeros(1, adapted.layout.size, device=device)
        stack.bind(weights_1P)
        with LiveBytes([*adapted.model.parameters(), *adapted.model.buffers(), weights_1P]) as live:
            places = torch.arange(max(1, tokens // length) * length, device=device)
            with stack.installed():
                stack.model.eval()
                adapted.loss_head.read_rows(places.view(-1, length), places, places)
    return int(live.peak)


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make while they are alive, those of `others` left out."""

    def __init__(self, others: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = weakref.WeakKeyDictionary({value.untyped_storage(): None for value in others})
        self.now: int = 0
        self.peak: int = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and (storage := value.untyped_storage()) not in self._seen:
                self._seen[storage] = None
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def free_bytes(device: torch.device) -> int:
    """Memory that can be had now: of the GPU with what torch holds unused, or of the machine or its container."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        # A share that the process may have at most is torch's own limit, of which the driver knows nothing.
        allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total) - reserved
        return min(free, allowed) + reserved - torch.cuda.memory_allocated(device)
    return free_memory()


def check_room(adapted: AdaptedModel, device: torch.device) -> None:
    """Refuse a base model that is larger than the memory of its GPU, before its weights are loaded.

    Raises:
        ModelError
    """
    needed, free = base_bytes(adapted), free_bytes(device)
    if needed > free:
        raise ModelError(
            f"its weights take {format_bytes(needed)}, and {device} has {format_bytes(free)} free: a model is never"
            " spread over several GPUs",
            where="model.source",
            mend='model.quantization = "4bit" takes the least; with model.device_map = "auto" what does not fit lies in'
            " memory, which is slow; or use a smaller model or a larger GPU",
        )


def room_for_weights(beside: int, device: torch.device) -> dict[int | str, int]:
    """Return the bytes of weights that may lie on the device beside those of a step, and, if it is a GPU, in memory.

    GPUs are named by their numbers and memory is "cpu", as accelerate has them.
    """
    room = max(0, int(SHARE_OF_FREE * free_bytes(device)) - beside)
    return {device.index: room, "cpu": int(SHARE_OF_FREE * free_memory())} if device.type == "cuda" else {"cpu": room}


def free_on_each(devices: Sequence[torch.device]) -> int:
    """Return the free memory of the device that has the least; one that is named several times is shared."""
    return min(free_bytes(device) // number for device, number in Counter(devices).items())


def share_of_each(clients: int, places: Sequence[object]) -> int:
    """Return how many clients at most each of several places has; without any, one process has them all."""
    return -(-clients // max(1, len(places)))
