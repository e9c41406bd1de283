"""Talk with what was trained on answers: the end is learnt, and an answer stops there."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny import make_recipe
from typer.testing import CliRunner

from fedloom import run
from fedloom.cli import app
from fedloom.data.prompting import Prompting
from fedloom.errors import DataError, RunError
from fedloom.evaluation.generation import Sampling, write_on
from fedloom.handover.generate import FORGOTTEN, Speaker, chat, generate
from fedloom.model.source import byte_tokenizer
from fedloom.monitoring.observer import Observer
from fedloom.recipe.data_section import Data
from fedloom.records.run import Run

pytestmark = pytest.mark.xdist_group("talking")  # two runs that all of them share
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
ANSWER = "ok."
STRONG = {"learning_rate": 0.03, "batch_size": 4, "epochs": 24}


def train(rows: list[dict[str, Any]], folder: Path, **data: Any) -> Run:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = make_recipe(
        adapter={"rank": 8, "alpha": 16, "targets": "all-linear"},
        data={"source": str(file), "max_length": 48, "clients": 2, "documents_per_client": 12, **data},
        training=STRONG,
        federation={"rounds": 4},
    )
    return run(recipe, folder / "run", Observer())


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Run:
    rows = [{"q": f"number {number}", "more": "", "a": ANSWER} for number in range(40)]
    return train(rows, tmp_path_factory.mktemp("asked"), prompt="Q {q}[[ and {more}]]\nA ", completion="{a}")


@pytest.fixture(scope="module")
def talked(tmp_path_factory: pytest.TempPathFactory) -> Run:
    rows = [
        {"messages": [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": ANSWER}]}
        for number in range(40)
    ]
    return train(rows, tmp_path_factory.mktemp("talked"), messages="messages", chat_template=TEMPLATE)


def said(function: Callable[..., None], *arguments: Any, **named: Any) -> str:
    pieces: list[str] = []
    function(*arguments, say=pieces.append, **named)
    return "".join(pieces)


@pytest.mark.long
def test_an_answer_is_written_and_ended_as_it_was_learnt(asked: Run) -> None:
    assert said(generate, asked.folder, "number 7", max_new_tokens=40) == f"{ANSWER}\n"
    base = said(generate, asked.folder, "number 7", base=True, max_new_tokens=40)
    assert base.endswith(f"{ANSWER}\n")
    first = base.split("--- with the adapter ---")[0]
    assert len(first) > 45, "the base model never learnt to stop"


@pytest.mark.parametrize(
    ("prompt", "question", "written"),
    [
        ("Q {q}[[ and {more}]]", '{"q": "x", "more": 0}', "Q x and 0"),
        ("Q {q}[[ and {more}]]", '{"sum": 1} is JSON of what?', 'Q {"sum": 1} is JSON of what?'),
        ("Q {q}[[ and {more}]]", '{"sum": 1}', 'Q {"sum": 1}'),
        ("[[Q {q}]]\nA ", "hello", "Q hello\nA "),
        ("[[Q {q}]]\nA ", '{"q": "hello"}', "Q hello\nA "),
        ("[[Q {q}]][[ and {more}]]", '{"more": "y"}', " and y"),
    ],
)
def test_a_question_is_written_as_a_row_would_be(prompt: str, question: str, written: str) -> None:
    tokenizer = byte_tokenizer()
    prompting = Prompting(Data(source="x", prompt=prompt, completion="{a}"), tokenizer, chats=False)
    assert tokenizer.decode(prompting.write([{"role": "user", "content": question}])) == written


def test_a_question_is_never_left_out() -> None:
    prompting = Prompting(Data(source="x", prompt="[[{q}]][[{more}]]", completion="{a}"), byte_tokenizer(), chats=False)
    for question in ("hello", "7", '{"sum": 1}', "{" * 9000):
        with pytest.raises(DataError, match="columns q, more; give them as JSON"):
            prompting.write([{"role": "user", "content": question}])


@pytest.mark.long
def test_several_columns_are_given_as_json(asked: Run) -> None:
    with Speaker(asked.folder) as speaker:
        whole = speaker.prompting.write([{"role": "user", "content": '{"q": "x", "more": "y"}'}])
        assert speaker._opened.tokenizer.decode(whole) == "Q x and y\nA "
        plain = speaker.prompting.write([{"role": "user", "content": "x"}])
        assert speaker._opened.tokenizer.decode(plain) == "Q x\nA "
        with pytest.raises(DataError, match="columns q, more; give them as JSON"):
            speaker.prompting.write([{"role": "user", "content": '{"more": "y"}'}])


def test_a_conversation_is_written_as_it_was_learnt(talked: Run) -> None:
    assert said(chat, talked.folder, iter(["say 7", "say 8"]), max_new_tokens=40) == f"{ANSWER}\n" * 2
    with Speaker(talked.folder) as speaker:
        told = [
            {"role": "user", "content": "1"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "3"},
        ]
        tokenizer = speaker._opened.tokenizer
        assert tokenizer.decode(speaker.prompting.write(told)) == "u:1<|end|>a:2<|end|>u:3<|end|>a:"
        assert speaker.prompting.stops == [tokenizer.eos_token_id]
    with_base = said(chat, talked.folder, iter(["say 7"]), base=True, max_new_tokens=30)
    assert with_base.index("base model") < with_base.index("with the adapter")
    assert with_base.endswith(f"{ANSWER}\n")


def test_a_long_conversation_forgets_its_beginning(talked: Run) -> None:
    """The model takes 256 tokens, which are some 15 questions with their answers."""
    lines = [f"say {number}" for number in range(30)]
    found = said(chat, talked.folder, iter(lines), max_new_tokens=6, system="Be brief.")
    assert found.count(FORGOTTEN) > 5
    assert found.startswith(f"{ANSWER}\n" * 3), "as long as all fits, nothing is forgotten"
    with pytest.raises(RunError, match="shorten it"):
        said(chat, talked.folder, iter(["say 7", "say " + "7" * 300]), max_new_tokens=6)


@pytest.mark.long
def test_what_is_drawn_is_drawn_again_with_its_seed(talked: Run) -> None:
    def drawn(seed: int, temperature: float = 8.0) -> str:
        return said(generate, talked.folder, "say 7", max_new_tokens=20, sampling=Sampling(temperature, 1.0, seed))

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(4)}) > 1
    # Of the likeliest words alone, nothing is left to draw.
    assert said(generate, talked.folder, "say 7", sampling=Sampling(8.0, 0.0001, 3)) == f"{ANSWER}\n"


def test_the_prompt_as_it_stands(talked: Run) -> None:
    assert said(generate, talked.folder, "u:say 7<|end|>a:", plain=True, max_new_tokens=20).startswith("u:say 7")


@pytest.mark.long
def test_the_base_model_is_without_the_residual_of_a_run(tmp_path: Path) -> None:
    """`fedex` adds a matrix beside each adapter, which switching the adapter off leaves where it is."""
    recipe = make_recipe(federation={"rounds": 2, "lora_rule": "fedex"}, training={"learning_rate": 0.5})
    finished = run(recipe, tmp_path / "run", Observer())
    question = [{"role": "user", "content": "import os"}]
    with Speaker(finished.folder, base=True) as speaker:
        assert speaker._trained.residual is not None
        found = [speaker.answer(question, base=base) for base in (True, False, True)]
        speaker._adapted.load(speaker._start)  # type: ignore[arg-type]
        with speaker._adapted.model.disable_adapter():
            tokens = speaker.prompting.write(question)
            expected = write_on(speaker._adapted, speaker._opened.tokenizer, tokens, room=80)
    assert found[0] == found[2] == expected != found[1]


@pytest.mark.long
def test_a_system_message_needs_a_conversation(asked: Run) -> None:
    with pytest.raises(RunError, match="no conversations"):
        said(chat, asked.folder, iter(["x"]), system="Be brief.")


def test_the_commands(talked: Run) -> None:
    runner = CliRunner()
    found = runner.invoke(app, ["chat", str(talked.folder)], input="say 7\n\nsay 8\n")
    assert (found.exit_code, found.stdout) == (0, f"{ANSWER}\n" * 2)
    found = runner.invoke(app, ["generate", str(talked.folder), "say 7", "--temperature", "0", "--tokens", "9"])
    assert (found.exit_code, found.stdout) == (0, f"{ANSWER}\n")
    recipe = str(talked.folder / "recipe.toml")
    shown = runner.invoke(app, ["preview", recipe, "--rows", "1"])
    assert shown.exit_code == 0
    assert f"a:«{ANSWER}<|end|>»" in shown.stdout
    assert "what the assistant says with its end, " in shown.stdout
    packed = runner.invoke(app, ["preview", recipe, "--rows", "1", "data.window=pack"])
    assert packed.exit_code == 0
    assert "— another text of the same block —" in packed.stdout
    assert re.search(r"\d+ texts packed into \d+ blocks, \d+ % full", packed.stdout)
    beyond = runner.invoke(app, ["preview", recipe, "--client", "2"])
    assert isinstance(beyond.exception, DataError)
