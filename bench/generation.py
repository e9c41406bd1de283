"""Seconds and tokens a second of answers, by how many prompts and adapters are written at once.

    python bench/generation.py [--shape smollm2-135m] [--prompts 8] [--room 24] [--adapters 3] [--dtype auto]

Random weights, LoRA of rank 16 on queries and values: the base model and other adapters answer prompts of 8 to 64
tokens, with as many tokens as there is room for. The first row is one prompt after another, each adapter by itself. The
rows take turns, and each is the best of its turns. One JSON line a row follows the table.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from itertools import chain

import torch
from options import add_shape, open_parser
from workload import DEVICE, VOCABULARY, build_adapted

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.evaluation.decoding import way_of
from fedloom.evaluation.generation import Prompt, Writing, write_with_each
from fedloom.model.devices import choose_dtype
from fedloom.model.source import byte_tokenizer
from fedloom.text import count

SHORTEST, LONGEST = 8, 64
"""Tokens of a prompt."""


def make_prompts(count: int, room: int) -> list[Prompt]:
    """Return prompts of random tokens, of lengths evenly spread."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.linspace(SHORTEST, LONGEST, count).round().long()[torch.randperm(count, generator=generator)]
    return [
        Prompt(torch.randint(0, VOCABULARY, (length,), generator=generator).tolist(), room)
        for length in lengths.tolist()
    ]


def make_adapters(adapted: AdaptedModel, count: int) -> list[Adapter | None]:
    """Return the base model and other adapters."""
    generator = torch.Generator().manual_seed(2)
    others = [
        Adapter(adapted.layout, 0.02 * torch.randn(adapted.layout.size, generator=generator)) for _ in range(count - 1)
    ]
    return [None, *others]


def measure(
    adapted: AdaptedModel, adapters: Sequence[Adapter | None], prompts: Sequence[Prompt], size: int, *, together: bool
) -> tuple[float, float, list[list[tuple[int, ...]]]]:
    """Return the seconds on the clock, those of the processor, and the tokens that each adapter wrote.

    `size` prompts are written at once.
    """
    groups = [list(adapters)] if together else [[adapter] for adapter in adapters]
    started, worked = time.perf_counter(), time.process_time()
    found = []
    for group in groups:
        answers = write_with_each(adapted, byte_tokenizer(), group, prompts, Writing(batch_size=size * len(group)))
        found += [[answer.tokens for answer in own] for own in answers]
    return time.perf_counter() - started, time.process_time() - worked, found


def main() -> None:
    parser = open_parser(__doc__)
    add_shape(parser, "--shape", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=8, help="(default: 8)")
    parser.add_argument("--room", type=int, default=24, help="tokens of an answer (default: 24)")
    parser.add_argument("--adapters", type=int, default=3, help="with the base model as one (default: 3)")
    parser.add_argument("--dtype", default="float32", help="what the base model is in, or auto (default: float32)")
    parser.add_argument("--turns", type=int, default=2, help="of which the best counts (default: 2)")
    wanted = parser.parse_args()
    dtype = choose_dtype(wanted.dtype, DEVICE)
    adapted = build_adapted(wanted.shape, dtype)
    prompts, adapters = make_prompts(wanted.prompts, wanted.room), make_adapters(adapted, wanted.adapters)
    sizes = sorted({1, min(4, wanted.prompts), wanted.prompts})
    cases = [(size, together) for together in (False, True) for size in sizes]
    way = way_of(adapted)
    told = f"{'keeps' if way.keeps else 'forgets'} what it computed, "
    told += f"{'several lengths' if way.pads else 'one length'} at once"
    print(f"{wanted.shape}, {dtype}, {DEVICE}, {torch.get_num_threads()} threads; {told}\n", flush=True)
    best: dict[tuple[int, bool], float] = {}
    least: dict[tuple[int, bool], float] = {}
    same: dict[tuple[int, bool], float] = {}
    expected: list[list[tuple[int, ...]]] = []
    for turn in range(wanted.turns):
        for case in cases:
            seconds, processor, found = measure(adapted, adapters, prompts, case[0], together=case[1])
            doing = f"{count(case[0], 'prompt')} at once, adapters {'together' if case[1] else 'one after another'}"
            print(f"turn {turn + 1} of {wanted.turns}, {doing}: {seconds:.1f} s", file=sys.stderr, flush=True)
            best[case] = min(seconds, best.get(case, seconds))
            least[case] = min(processor, least.get(case, processor))
            if not turn:
                expected = expected or found
                pairs = [*zip(chain(*found), chain(*expected), strict=True)]
                same[case] = sum(one == other for one, other in pairs) / len(pairs)
    tokens = wanted.adapters * wanted.prompts * wanted.room
    print("| prompts at once | adapters at once | s | tokens/s | × the first | processor s | × the first | same |")
    print("|---|---|---|---|---|---|---|---|")
    lines = []
    for case in cases:
        size, together = case
        row = {
            "shape": wanted.shape, "prompts_at_once": size, "adapters_at_once": wanted.adapters if together else 1,
            "seconds": best[case], "tokens_per_second": tokens / best[case],
            "times_the_first": best[cases[0]] / best[case], "same_answers": same[case],
            "processor_seconds": least[case],
        }  # fmt: skip
        print(
            f"| {size} | {row['adapters_at_once']} | {best[case]:.1f} | {row['tokens_per_second']:.0f} |"
            f" {row['times_the_first']:.1f} | {least[case]:.1f} | {least[cases[0]] / least[case]:.1f} |"
            f" {same[case]:.0%} |",
            flush=True,
        )
        lines.append(json.dumps(row))
    print("\n".join(["", *lines]))


if __name__ == "__main__":
    main()
