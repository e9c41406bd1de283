"""Chat templates as programs of strangers: what they may not have, and what is stopped."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.marks import first

from fedloom.data import chat_renderer
from fedloom.data.chat_renderer import ChatRenderer, RenderError
from fedloom.errors import DataError
from fedloom.model.source import byte_tokenizer

TALK = [{"role": "user", "content": "hello"}]


def render(template: str) -> str:
    with ChatRenderer(template, byte_tokenizer()) as renderer:
        return renderer.render(TALK, [(1, False)])[0][0]


def test_constants_and_filters_are_those_of_transformers() -> None:
    tokenizer = byte_tokenizer()
    template = "{{ eos_token }}{{ messages | tojson }}{% for m in messages %}\n  {%- break %}{% endfor %}"
    expected = tokenizer.apply_chat_template(TALK, chat_template=template, tokenize=False)
    assert render(template) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ generation_marks.__class__ }}",
    ],
)
def test_nothing_but_the_conversation_can_be_had(template: str) -> None:
    try:
        found = render(template)
    except (DataError, RenderError) as error:
        found = str(error) if "hello" in str(error) else ""
    assert found in ("", "[]")


@pytest.mark.parametrize(
    ("template", "why"),
    first(
        [
            ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "not done after"),
            ("{% set a = 'x' * 10**9 %}{% set b = a * 2 %}{{ b }}", "MemoryError|not done after"),
            ("{{ messages[0].content * 10**9 }}", "makes too long"),
            ("{{ 'x' * 100000000 }}", "makes too long|not done after"),
            ("{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "makes too long"),
            ("{{ messages|length + 10 ** (10 ** 9) }}", "not done after|MemoryError|too long"),
        ],
    ),
)
def test_a_template_without_an_end_is_stopped(template: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_renderer, "SECONDS", 2.0)
    began = time.monotonic()
    with pytest.raises((DataError, RenderError), match=why):
        render(template)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("template", ["{% for %}", "{{ ", "{% include 'x' %}", "{% import 'os' as os %}{{ os }}"])
def test_what_is_no_template_is_refused(template: str) -> None:
    with pytest.raises((DataError, RenderError)):
        render(template)


def test_no_file_is_read_and_no_variable_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLOOM_SECRET", "kept")
    (tmp_path / "secret").write_text("kept", encoding="utf-8")
    found: list[str] = []
    steal: Callable[[str], None] = lambda template: found.append(render(template))  # noqa: E731
    for template in (
        f"{{% include '{tmp_path / 'secret'}' %}}",
        "{{ self.environment.globals }}{{ joiner.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].environ }}",
    ):
        try:
            steal(template)
        except (DataError, RenderError):
            continue
    assert "kept" not in "".join(found)


def test_one_row_that_fails_does_not_end_the_next() -> None:
    with ChatRenderer("{{ messages[0].content + 1 }}", byte_tokenizer()) as renderer:
        for _ in range(2):
            with pytest.raises(RenderError, match="fails on"):
                renderer.render(TALK, [(1, False)])


def test_the_process_ends_with_its_renderer() -> None:
    renderer = ChatRenderer("x", byte_tokenizer())
    process = renderer._process
    renderer.close()
    assert process.poll() is not None
    with pytest.raises(DataError, match="ended the process"):
        renderer.render(TALK, [(1, False)])
