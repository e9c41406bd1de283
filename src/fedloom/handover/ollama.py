"""Folder that Ollama makes a model of: GGUF files, and a Modelfile with the template that the run was trained with.

Ollama's templates are Go's and can't be made of any chat template. A run's own is tried: where it writes a conversation
as one of the known shapes does, to the letter, that shape is written in Go. Otherwise it is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.data.chat_renderer import ChatRenderer, RenderError
from fedloom.data.prompting import Message, Prompting
from fedloom.errors import RunError
from fedloom.handover.gguf import DEFAULT_KIND, write_file, write_pair
from fedloom.handover.proof import Subject
from fedloom.host.files import replace_folder, writing
from fedloom.model.gguf_vocabulary import ends_of
from fedloom.monitoring.observer import Observer
from fedloom.recipe.templates import parse_template

MODELFILE = "Modelfile"
TALK: tuple[Message, ...] = (
    {"role": "user", "content": "What is this?"},
    {"role": "assistant", "content": "It is that."},
    {"role": "user", "content": "And the other?"},
)
"""Conversation that a chat template is tried with."""
QUOTES = '"""'


@dataclass(frozen=True)
class Shape:
    """Shape of a conversation: what stands before and behind each message."""

    name: str
    before: str
    """Text before a message's content; `{role}` stands for its role."""
    behind: str

    def write(self, message: Message) -> str:
        """Return a message as it stands in the text."""
        return self.before.format(**message) + str(message["content"]) + self.behind

    def to_go(self, begin: str) -> str:
        """Return Go's template of such conversations, up to the assistant's next turn."""
        turn = self.before.format(role="{{ .Role }}") + "{{ .Content }}" + self.behind
        return begin + "{{ range .Messages }}" + turn + "{{ end }}" + self.before.format(role="assistant")


SHAPES = (
    Shape("ChatML", "<|im_start|>{role}\n", "<|im_end|>\n"),
    Shape("Llama 3", "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"),
)


def export_for_ollama(subject: Subject, to: Path, *, merged: bool, kind: str | None, display: Observer) -> float:
    """Write the folder, prove the model in it, and return how far its logits are from the run's.

    Raises:
        RunError: the run's chat template has none of the known shapes, or as `fedloom.handover.export.export`.
    """
    lines = _describe(subject)
    whole = merged or subject.adapted.is_whole
    with writing(to, "name another with --ollama"), replace_folder(to, existing="refuse") as written:
        display.show_step("writing", str(to))
        if whole:
            opened, tolerance = write_file(subject, written / "model.gguf", kind or DEFAULT_KIND, whole=True)
            lines = ["FROM ./model.gguf", *lines]
        else:
            files = written / "base.gguf", written / "adapter.gguf"
            opened, tolerance = write_pair(subject, *files, kind or DEFAULT_KIND)
            lines = ["FROM ./base.gguf", "ADAPTER ./adapter.gguf", *lines]
        (written / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
        display.show_step("proof", f"logits of {len(subject.tokens_BT)} hold-out blocks")
        return subject.prove(opened, to, tolerance)


def _describe(subject: Subject) -> list[str]:
    """Return the lines of the Modelfile that say how to ask the model.

    Raises:
        RunError: it can't be said in Ollama's way.
    """
    data, tokenizer = subject.recipe.data, subject.source.tokenizer
    system = None
    if subject.chat_template is not None:
        if data.prompt is not None and parse_template(data.prompt).only_column is None:
            raise RunError("the run writes its prompt around each question of a chat", where="--ollama", mend=MEND)
        template, system = to_go(subject.chat_template, tokenizer, data.system)
    elif data.prompt is not None:
        template = _prompt_to_go(data.prompt)
    else:
        template = "{{ .Prompt }}"
    if any(QUOTES in text for text in (template, system or "")):
        raise RunError(f"Ollama can't write the {QUOTES} in the run's template", where="--ollama", mend=MEND)
    prompting = Prompting(data, tokenizer, chats=data.is_chat)
    prompting.close()
    # What ends an answer in the run's own generation; all of them stand for no text.
    stops = tokenizer.convert_ids_to_tokens(prompting.stops)
    return [
        f"TEMPLATE {QUOTES}{template}{QUOTES}",
        *([f"SYSTEM {QUOTES}{system}{QUOTES}"] if system else []),
        *(f'PARAMETER stop "{stop}"' for stop in stops),
    ]


MEND = "export a .gguf file: llama-server --jinja reads the run's own template from it"


def to_go(chat_template: str, tokenizer: Any, system: str | None) -> tuple[str, str | None]:
    """Return a chat template as Go's, and the system message that it writes if nobody gives one.

    Raises:
        RunError: it has none of the known shapes.
    """
    first = [] if system is None else [{"role": "system", "content": system}]
    talk = [*first, *TALK]
    with ChatRenderer(chat_template, tokenizer) as renderer:
        try:
            (text,), _ = renderer.render(talk, [(len(talk), True)])
        except RenderError as error:
            raise RunError(f"a conversation {error}", where="--ollama", mend=MEND) from None
    begin = tokenizer.bos_token or ""
    adds, _ = ends_of(tokenizer)
    for shape in SHAPES:
        turns = "".join(shape.write(message) for message in TALK) + shape.before.format(role="assistant")
        if not text.endswith(turns):
            continue
        before = text.removesuffix(turns)
        # llama.cpp begins a text as the tokenizer does; what a template begins it with is left to it, or written.
        for begins in (True, False) if begin and before.startswith(begin) else (False,):
            found, inner = _split_system(shape, before.removeprefix(begin) if begins else before)
            if found and not (adds and not begins):
                return shape.to_go(begin if begins and not adds else ""), inner
    raise RunError(
        f"the run's chat template has a shape that fedloom can't write for Ollama; it knows"
        f" {', '.join(shape.name for shape in SHAPES)}",
        where="--ollama",
        mend=MEND,
    )


def _split_system(shape: Shape, text: str) -> tuple[bool, str | None]:
    """Return whether a text is empty or one system message, and the message."""
    before = shape.before.format(role="system")
    if not text:
        return True, None
    inner = text.removeprefix(before).removesuffix(shape.behind)
    return text == before + inner + shape.behind and shape.behind.strip() not in inner, inner


def _prompt_to_go(prompt: str) -> str:
    """Return a run's prompt as Go's template, with the question in the place of its only column.

    Raises:
        RunError: it has several columns.
    """
    template = parse_template(prompt)
    needed = {name for pieces, optional in template.parts for name, column in pieces if column and not optional}
    if len(needed) != 1:
        raise RunError(
            f"the run's prompt has the columns {', '.join(template.columns)}, and Ollama asks for one text",
            where="--ollama",
            mend="export a .gguf file, and write the prompt yourself",
        )
    return "".join(
        "{{ .Prompt }}" if column else text.replace("{", '{{ "{" }}')
        for pieces, optional in template.parts
        if not optional
        for text, column in pieces
    )
