"""Rows become text with marks: answers, conversations, what is refused; TRL's templates are the oracle."""

from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.marks import first

from fedloom.data.formats import Form, RowFormat
from fedloom.data.marked_tokens import tokenize_form
from fedloom.data.rows import UnreadableError
from fedloom.errors import DataError
from fedloom.model.source import byte_tokenizer
from fedloom.recipe.data_section import Data

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is four."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "Six, of course."},
]
TEMPLATES = Path(next(iter(find_spec("trl").submodule_search_locations))) / "chat_templates"  # type: ignore[union-attr, arg-type]
KEPT = ("chatml", "cohere", "cohere2", "gemma", "gemma3", "lfm2", "llama3", "phi3", "phi3_5", "qwen2_5_vl")
KEPT = tuple(name for name in (*KEPT, "qwen3_instruct_2507", "qwen3_vl") if name != "chatml")
"""Families whose template keeps what it wrote as a conversation goes on, so that both of us know their turns."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = byte_tokenizer()
    ends = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>", "<|end|>"]
    made.add_special_tokens({"additional_special_tokens": ends, "bos_token": "<s>"})
    made.chat_template = CHATML
    return made


@pytest.fixture
def shape(tokenizer: Any) -> Iterator[Any]:
    """Make a form of a row under some settings of `data`."""
    opened: list[RowFormat] = []

    def shaped(row: dict[str, Any], template: str = CHATML, **data: Any) -> Form:
        section = Data.model_validate({"source": "x", "chat_template": template, **data})
        opened.append(RowFormat(section, lambda: tokenizer))
        return opened[-1](row)

    yield shaped
    for one in opened:
        one.close()


def counted(form: Form) -> list[str]:
    return [form.text[begin:end] for begin, end in form.counted or ()]


def learnt(form: Form, tokenizer: Any) -> str:
    tokens_T, counts_T = tokenize_form(form, tokenizer, 4096)
    return str(tokenizer.decode(tokens_T[counts_T]))


def test_an_answer_counts_with_one_end(tokenizer: Any) -> None:
    data = Data(source="x", prompt="Q: {q}\nA: ", completion="{a}")
    form = RowFormat(data)({"q": "1 + 1?", "a": "2"})
    assert (form.text, form.prompt, counted(form)) == ("Q: 1 + 1?\nA: 2", "Q: 1 + 1?\nA: ", ["2"])
    assert learnt(form, tokenizer) == "2" + tokenizer.eos_token
    without = RowFormat(data.model_copy(update={"end": False}))({"q": "", "a": "2"})
    assert learnt(without, tokenizer) == "2"
    whole = RowFormat(data.model_copy(update={"loss": "all"}))({"q": "1 + 1?", "a": "2"})
    assert learnt(whole, tokenizer) == "Q: 1 + 1?\nA: 2"


def test_every_turn_of_the_assistant_or_the_last(shape: Any, tokenizer: Any) -> None:
    row = {"messages": TALK}
    assert counted(shape(row, messages="messages")) == ["It is four.<|im_end|>\n", "Six, of course.<|im_end|>\n"]
    assert counted(shape(row, messages="messages", loss="completion")) == ["Six, of course.<|im_end|>\n"]
    everything = shape(row, messages="messages", loss="all")
    assert everything.counted is None
    assert learnt(everything, tokenizer) == everything.text


def test_every_way_to_write_a_conversation_comes_to_the_same(shape: Any) -> None:
    first = shape({"messages": TALK}, messages="messages")
    names = {"user": "human", "assistant": "gpt"}
    shared = [{"from": names[one["role"]], "value": one["content"]} for one in TALK]
    assert shape({"conversations": shared}, messages="conversations") == first
    lists = {"prompt": TALK[:3], "completion": TALK[3:]}
    last = shape(lists, prompt="{prompt}", completion="{completion}")
    assert (last.text, counted(last)) == (first.text, ["Six, of course.<|im_end|>\n"])
    # Plain columns are a question and its answer, where a chat template is asked for.
    plain = shape({"q": "What?", "a": "That."}, prompt="Tell: {q}", completion="{a}")
    said = [{"role": "user", "content": "Tell: What?"}, {"role": "assistant", "content": "That."}]
    assert plain == shape({"messages": said}, messages="messages")
    own = shape({"messages": said}, "tokenizer", messages="messages")
    assert own == plain, "the tokenizer's own is the same"
    with pytest.raises(UnreadableError, match="a list of messages"):
        RowFormat(Data(source="x", prompt="{prompt}", completion="{completion}"))(lists)
    # A question at the end has no answer, and teaches nothing.
    assert shape({"messages": [*TALK, TALK[0]]}, messages="messages") == first


def test_a_system_message_where_a_row_has_none(shape: Any) -> None:
    form = shape({"m": TALK}, messages="m", system="Be brief.")
    assert form.text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    own = [{"role": "system", "content": "Be long."}, *TALK]
    assert "Be brief." not in shape({"m": own}, messages="m", system="Be brief.").text


@pytest.mark.parametrize("family", first(KEPT, keep=4))
def test_masks_are_trls(family: str, shape: Any, tokenizer: Any) -> None:
    stock, training = ((TEMPLATES / f"{family}{kind}.jinja").read_text(encoding="utf-8") for kind in ("", "_training"))
    theirs = tokenizer.apply_chat_template(
        TALK, chat_template=training, return_assistant_tokens_mask=True, return_dict=True
    )
    form = shape({"messages": TALK}, stock, messages="messages", end=False)
    tokens_T, counts_T = tokenize_form(form, tokenizer, 4096)
    assert tokens_T.tolist() == theirs["input_ids"]
    assert counts_T.int().tolist() == theirs["assistant_masks"]


def test_marks_of_a_template_count_where_it_changes_what_it_wrote(shape: Any) -> None:
    # Each turn is numbered from the end: what stands before a turn depends on those behind it.
    numbered = (
        "{% for m in messages %}[{{ messages|length - loop.index }}]{{ m.role }}:"
        "{% if m.role == 'assistant' %}BEGIN{{ m.content }};END{% else %}{{ m.content }};{% endif %}{% endfor %}"
    )
    with pytest.raises(UnreadableError, match="changes as a conversation goes on"):
        shape({"m": TALK}, numbered.replace("BEGIN", "").replace("END", ""), messages="m")
    marked = numbered.replace("BEGIN", "{% generation %}").replace("END", "{% endgeneration %}")
    assert counted(shape({"m": TALK}, marked, messages="m")) == ["It is four.;", "Six, of course.;"]
    assert counted(shape({"m": TALK}, marked, messages="m", loss="completion")) == ["Six, of course.;"]


def test_an_end_that_the_next_turn_writes_belongs_to_its_own(shape: Any, tokenizer: Any) -> None:
    late = (
        "{% for m in messages %}{% if m.role == 'user' %}{% if not loop.first %}{{ eos_token }}{% endif %}Q "
        "{% endif %}{{ m.content }} {% endfor %}"
    )
    form = shape({"m": TALK}, late, messages="m")
    assert counted(form) == [f"It is four. {tokenizer.eos_token}", "Six, of course. "]
    assert learnt(form, tokenizer).count(tokenizer.eos_token) == 2, "the last one is given, too"


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        (None, "without messages in column m"),
        ([], "without messages in column m"),
        ("hello", "not a list"),
        (["hello"], "not an object"),
        ([{"role": "wizard", "content": "SECRET"}], "another role"),
        ([{"role": 7, "content": "SECRET"}], "another role"),
        ([{"role": "user", "content": 7}], "content is not text"),
        ([{"role": "user", "content": "SECRET"}], "without a turn of the assistant"),
    ],
)
def test_what_is_no_conversation_is_named_without_its_words(messages: Any, why: str, shape: Any) -> None:
    with pytest.raises(UnreadableError, match=why) as caught:
        shape({"m": messages}, messages="m")
    assert "SECRET" not in str(caught.value)
    assert "wizard" not in str(caught.value)


def test_a_template_that_refuses_or_hides_an_answer(shape: Any) -> None:
    strict = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('no ' + messages[0].content) }}{% endif %}" + CHATML
    )
    with pytest.raises(UnreadableError, match="refused by the chat template") as caught:
        shape({"m": TALK}, strict, messages="m")
    assert "2 + 2" not in str(caught.value)
    with pytest.raises(UnreadableError, match="changes or leaves out"):
        shape({"m": TALK}, CHATML.replace("message['content']", "message['content'][:4]"), messages="m")


def test_what_a_table_has_beside_the_words_of_a_message_ends_nothing(shape: Any) -> None:
    said = [{**TALK[0], "at": datetime(2026, 1, 2, tzinfo=UTC)}, {**TALK[1], "sum": b"\xff"}]
    assert counted(shape({"m": said}, messages="m")) == ["It is four.<|im_end|>\n"]
    assert "2026-01-02" in shape({"m": said}, "{{ messages[0].at }}" + CHATML, messages="m").text
    deep: Any = []
    for _ in range(2000):
        deep = [deep]
    with pytest.raises(UnreadableError, match="can't be told"):
        shape({"m": [*TALK, {**TALK[1], "deep": deep}]}, messages="m")


def test_a_special_token_that_is_said_is_no_end_of_an_answer(shape: Any, tokenizer: Any) -> None:
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant: {% endif %}"
    said = "In HTML, <s> strikes out."
    form = shape({"m": [TALK[0], {"role": "assistant", "content": said}]}, plain, messages="m")
    assert learnt(form, tokenizer) == f"{said}\n{tokenizer.eos_token}"
    # And an answer without words is its end alone, of which there is one.
    empty = shape({"m": [TALK[0], {"role": "assistant", "content": ""}]}, messages="m")
    assert learnt(empty, tokenizer) == "<|im_end|>\n"


@pytest.mark.parametrize("gap", ["", "\n"])
def test_where_a_template_marks_words_alone_their_end_is_learnt_with_them(gap: str, shape: Any, tokenizer: Any) -> None:
    # It writes more before the last answer than before the others, so its own marks alone say where they stand.
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% if loop.last %}<think>{% endif %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
        f"{{{{ m.content }}}}{{% endif %}}{{{{ '{gap}<|im_end|>\n' }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    form = shape({"m": TALK}, marked, messages="m")
    assert counted(form) == [f"It is four.{gap}<|im_end|>", f"Six, of course.{gap}<|im_end|>"]
    assert not form.ends
    unended = shape({"m": TALK}, marked, messages="m", end=False)
    assert counted(unended) == ["It is four.", "Six, of course."]
    nested = marked.replace("{{ m.content }}{% endg", "{% generation %}{{ m.content }}{% endgeneration %}{% endg")
    assert shape({"m": TALK}, nested, messages="m") == form, "a block inside of another is no span of its own"


@pytest.mark.parametrize("call", [{"function": {"name": "add", "arguments": {}}}, {"name": "add"}], ids=str)
def test_a_call_that_the_template_leaves_out_is_no_empty_answer(call: dict[str, Any], shape: Any) -> None:
    row = {"m": [TALK[0], {"role": "assistant", "content": None, "tool_calls": [call]}]}
    with pytest.raises(UnreadableError, match="changes or leaves out"):
        shape(row, messages="m")
    assert "add" in counted(shape(row, CHATML.replace("message['content']", "message | tojson"), messages="m"))[0]
    with pytest.raises(UnreadableError, match="content is not text"):
        shape({"m": [TALK[0], {"role": "assistant", "content": None, "tool_calls": "add"}]}, messages="m")


def test_a_missing_column_is_no_empty_prompt() -> None:
    form = RowFormat(Data(source="x", prompt="{q}[[ {more}]]", completion="{a}"))
    assert form({"q": "a", "a": "b"}).text == "ab"
    for row in ({"a": "b"}, {"q": None, "a": "b"}):
        with pytest.raises(UnreadableError, match="without text in column q"):
            form(row)
    with pytest.raises(UnreadableError, match="empty"):
        form({"q": "a", "a": "  "})


def test_a_model_without_a_template_says_what_to_do(tokenizer: Any) -> None:
    bare = byte_tokenizer()
    form = RowFormat(Data(source="x", messages="m"), lambda: bare)
    with pytest.raises(DataError, match=r"data\.chat_template: the base model's tokenizer has none, .*; name a file"):
        form({"m": TALK})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.text(max_size=40), answer=st.text(min_size=1, max_size=40).filter(str.strip))
def test_what_counts_is_the_answer_and_its_end(prompt: str, answer: str, tokenizer: Any) -> None:
    form = RowFormat(Data(source="x", prompt="{q}>", completion="{a}"))({"q": prompt, "a": answer})
    try:
        (form.text).encode()
    except UnicodeEncodeError:
        return
    specials = tokenizer.all_special_tokens
    if not any(token in form.text for token in specials):
        assert learnt(form, tokenizer) == answer + tokenizer.eos_token
