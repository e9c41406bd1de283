"""A folder for Ollama, and the command for vLLM: the run's own template, its ends, the right rank."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from support.marks import first
from support.small_models import CHATML, make_tokenizer, write_small_model
from support.tiny import make_recipe
from typer.testing import CliRunner

from fedloom import run
from fedloom.cli import app
from fedloom.data.chat_renderer import ChatRenderer
from fedloom.data.prompting import Prompting
from fedloom.errors import FedloomError, RunError
from fedloom.handover.export import export
from fedloom.handover.finished_run import recipe_of
from fedloom.handover.ollama import to_go
from fedloom.handover.vllm import read_rank, serve_command
from fedloom.model.source import open_model
from fedloom.monitoring.observer import Observer
from fedloom.records.run import Run

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SAYS_WHO = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are small.<|im_end|>\n' }}{% endif %}" + CHATML
)
TALK = [
    {"role": "user", "content": "a  b"},
    {"role": "assistant", "content": "c\n\nd"},
    {"role": "user", "content": "{{ e }}"},
]


def render_go(template: str, messages: list[dict[str, str]]) -> str:
    """What Go makes of such a template, of which it needs one loop alone."""
    begin, _, rest = template.partition("{{ range .Messages }}")
    turn, _, end = rest.partition("{{ end }}")
    turns = ("".join((turn.replace("{{ .Role }}", m["role"]).split("{{ .Content }}")[0], m["content"],
                      turn.split("{{ .Content }}")[1])) for m in messages)  # fmt: skip
    return begin + "".join(turns) + end


@pytest.mark.parametrize(("template", "system"), [(CHATML, None), (SAYS_WHO, "You are small."), (LLAMA3, None)])
@pytest.mark.parametrize("given", first(["Be brief.", None]))
def test_a_template_in_go_writes_what_the_runs_own_writes(template: str, system: str | None, given: str | None) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    found, inner = to_go(template, tokenizer, given)
    assert inner == (given or system)
    first = [{"role": "system", "content": inner}] if inner else []
    with ChatRenderer(template, tokenizer) as renderer:
        talk = [*([{"role": "system", "content": given}] if given else []), *TALK]
        (text,), _ = renderer.render(talk, [(len(talk), True)])
    assert render_go(found, [*first, *TALK]) == text


@pytest.mark.long
@pytest.mark.skipif(shutil.which("go") is None, reason="no go")
@pytest.mark.parametrize("template", [SAYS_WHO, LLAMA3])
def test_go_itself_writes_what_the_runs_own_template_writes(template: str, tmp_path: Path) -> None:
    found, inner = to_go(template, make_tokenizer(chat_template=template), "Be brief.")
    messages = [{"role": "system", "content": inner}, *TALK]
    program = """package main
import ("encoding/json"; "os"; "text/template")
type message struct { Role string `json:"role"`; Content string `json:"content"` }
func main() {
    var asked struct { Template string; Messages []message }
    json.NewDecoder(os.Stdin).Decode(&asked)
    template.Must(template.New("").Parse(asked.Template)).Execute(os.Stdout, map[string]any{"Messages": asked.Messages})
}
"""
    (tmp_path / "main.go").write_text(program)
    asked = json.dumps({"Template": found, "Messages": messages})
    told = subprocess.run(
        ["go", "run", str(tmp_path / "main.go")], input=asked, capture_output=True, text=True, check=True
    )
    assert told.stdout == render_go(found, messages)


def test_what_a_tokenizer_begins_a_text_with_is_written_once() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(chat_template=LLAMA3)
    begin = tokenizer.bos_token
    assert to_go(LLAMA3, tokenizer, None)[0].startswith(begin)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
    )
    assert to_go(LLAMA3, tokenizer, None)[0].startswith("{{ range")
    # Trained without it, a model would get one that it never saw.
    with pytest.raises(RunError, match="a shape that fedloom can't write for Ollama"):
        to_go(LLAMA3.replace("{{ bos_token }}", ""), tokenizer, None)


@pytest.mark.parametrize(
    "template",
    first(
        [
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:",
            CHATML.replace("m['content']", "m['content'] | upper"),
            CHATML.replace("assistant\n", "assistant\n<think>\n"),
            "{{ 'Hello' }}" + CHATML,
        ]
    ),
)
def test_a_template_of_another_shape_is_refused(template: str) -> None:
    with pytest.raises(RunError, match=r"a shape that fedloom can't write for Ollama; it knows ChatML, Llama 3"):
        to_go(template, make_tokenizer(), None)


def train(folder: Path, rows: list[dict[str, Any]], source: str | None = None, **sections: Any) -> Run:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = source or str(write_small_model(folder / "model"))
    data = {"source": str(folder / "rows.jsonl"), "max_length": 48, **sections.pop("data", {})}
    recipe = make_recipe(model={"source": source}, data=data, federation={"rounds": 1}, **sections)
    return run(recipe, folder / "run", Observer())


CHATS = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}."}]}
    for n in range(40)
]


@pytest.fixture(scope="module")
def talked(tmp_path_factory: pytest.TempPathFactory) -> Run:
    data = {"messages": "messages", "system": "Be brief."}
    return train(tmp_path_factory.mktemp("talked"), CHATS, data=data)


def test_a_folder_for_ollama_has_all_that_it_asks_for(talked: Run, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(talked.folder), "--ollama", str(tmp_path / "my model")])
    assert result.exit_code == 0, result.output
    assert f"ollama create 'my model' -f '{tmp_path}/my model/Modelfile'" in result.output
    folder = tmp_path / "my model"
    assert {path.name for path in folder.iterdir()} == {"Modelfile", "base.gguf", "adapter.gguf"}
    assert (folder / "Modelfile").read_text() == (
        "FROM ./base.gguf\nADAPTER ./adapter.gguf\n"
        'TEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}'
        '<|im_start|>assistant\n"""\nSYSTEM """Be brief."""\n'
        'PARAMETER stop "<|endoftext|>"\nPARAMETER stop "<|im_end|>"\n'
    )
    assert str(talked.folder.parent).encode() not in (folder / "base.gguf").read_bytes()
    # What Ollama would ask is what the run itself asks.
    recipe = recipe_of(talked.folder)
    tokenizer = open_model(recipe.model.source).tokenizer
    prompting = Prompting(recipe.data, tokenizer, chats=True)
    template = (folder / "Modelfile").read_text().split('"""')[1]
    asked = render_go(template, [{"role": "system", "content": "Be brief."}, TALK[0]])
    assert tokenizer(asked)["input_ids"] == prompting.write([TALK[0]])
    prompting.close()


@pytest.mark.long
def test_a_merged_model_for_ollama_is_one_file(talked: Run, tmp_path: Path) -> None:
    export(talked.folder, tmp_path / "merged", merged=True, ollama=True, kind="q8_0")
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {"Modelfile", "model.gguf"}
    assert (tmp_path / "merged" / "Modelfile").read_text().startswith("FROM ./model.gguf\nTEMPLATE ")
    kinds = {tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "merged" / "model.gguf").tensors}
    assert kinds == {"Q8_0", "F32"}


@pytest.mark.long
def test_a_base_model_that_came_as_a_file_is_that_file(
    talked: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "cache"))
    export(talked.folder, tmp_path / "base.gguf", merged=True, kind="q8_0")
    again = train(tmp_path, CHATS, str(tmp_path / "base.gguf"), data={"messages": "messages"})
    assert export(again.folder, tmp_path / "folder", ollama=True) < 1e-6
    assert (tmp_path / "folder" / "base.gguf").read_bytes() == (tmp_path / "base.gguf").read_bytes()


@pytest.mark.long
def test_a_prompt_is_written_around_the_question(tmp_path: Path) -> None:
    rows = [{"q": f"number {n}", "more": "", "a": "ok."} for n in range(40)]
    asked = {"prompt": "# {{{{x}}}}\nQ {q}[[ and {more}]]\nA ", "completion": "{a}"}
    other = train(tmp_path, rows, data=asked)
    export(other.folder, tmp_path / "folder", ollama=True)
    template = (tmp_path / "folder" / "Modelfile").read_text().split('"""')[1]
    assert template == '# {{ "{" }}{{ "{" }}x}}\nQ {{ .Prompt }}\nA '
    (tmp_path / "two").mkdir()
    two = train(tmp_path / "two", rows, data={**asked, "prompt": "{q} {more} ", "completion": "{a}"})
    with pytest.raises(RunError, match="has the columns q, more, and Ollama asks for one text"):
        export(two.folder, tmp_path / "never", ollama=True)
    (tmp_path / "chat").mkdir()
    around = {**asked, "prompt": "Please: {q}", "chat_template": CHATML}
    chat = train(tmp_path / "chat", rows, data=around)
    with pytest.raises(RunError, match="the run writes its prompt around each question of a chat"):
        export(chat.folder, tmp_path / "never", ollama=True)
    assert not (tmp_path / "never").exists()


def test_what_to_type_for_vllm_has_the_rank_and_the_template(talked: Run, tmp_path: Path) -> None:
    to = tmp_path / "my adapter"
    result = CliRunner().invoke(app, ["export", str(talked.folder), "--to", str(to), "--vllm"])
    assert result.exit_code == 0, result.output
    words = shlex.split(result.output.strip().splitlines()[-1])
    assert words == [
        "vllm", "serve", recipe_of(talked.folder).model.source, "--enable-lora", "--max-lora-rank", "8",
        "--lora-modules", f"test={to}", "--chat-template", f"{to}/chat_template.jinja",
    ]  # fmt: skip
    assert Path(words[-1]).read_text() == CHATML
    assert serve_command(talked.folder, tmp_path / "m", merged=True) == f"vllm serve {tmp_path}/m"
    with pytest.raises(RunError, match="vLLM serves folders"):
        serve_command(talked.folder, tmp_path / "m.gguf")


def test_vllm_makes_room_for_the_next_rank_that_it_knows() -> None:
    config = {"peft_type": "LORA", "bias": "none"}
    assert [read_rank({**config, "r": rank}) for rank in (1, 8, 9, 64, 257, 512)] == [8, 8, 16, 64, 320, 512]
    refused = {
        "a rank of 513": {"r": 513},
        "DoRA": {"r": 4, "use_dora": True},
        "layers that were trained as a whole": {"r": 4, "modules_to_save": ["norm"]},
        "ranks that differ": {"r": 4, "rank_pattern": {"q_proj": 2}},
        "trained biases": {"r": 4, "bias": "all"},
        "the method ia3": {"peft_type": "IA3"},
    }
    for says, options in refused.items():
        with pytest.raises(RunError, match=f"vLLM can't serve an adapter with {says}.*--merged"):
            read_rank({**config, **options})


def test_a_base_model_that_vllm_can_not_load_is_said_before_anything_is_written(tmp_path: Path) -> None:
    other = train(tmp_path, [{"text": f"some words {n} and more"} for n in range(40)], "random:tiny-llama")
    result = CliRunner().invoke(app, ["export", str(other.folder), "--to", str(tmp_path / "a"), "--vllm"])
    assert isinstance(result.exception, FedloomError)
    assert "vLLM can't load random:tiny-llama; export the merged model" in str(result.exception)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("options", [[], ["--to", "a", "--ollama", "b"], ["--ollama", "b", "--vllm"]])
def test_one_target_is_asked_for(talked: Run, options: list[str]) -> None:
    result = CliRunner().invoke(app, ["export", str(talked.folder), *options])
    assert "one target is needed" in str(result.exception)


def test_an_option_that_was_not_typed_is_blamed_for_nothing(tmp_path: Path) -> None:
    """What is written for Ollama is refused by what writes .gguf files for --to as well."""
    finished = run(make_recipe(federation={"rounds": 1}), tmp_path / "run", Observer())
    (tmp_path / "there").mkdir()
    refused = {
        "model.source: fedloom knows no tokenizer of llama.cpp": tmp_path / "new",
        "there: the target exists; name another, or remove it": tmp_path / "there",
        "not a possible target": tmp_path / ("x" * 300),
    }
    for says, target in refused.items():
        found = CliRunner().invoke(app, ["export", str(finished.folder), "--ollama", str(target)])
        assert isinstance(found.exception, FedloomError)
        assert says in str(found.exception)
        assert "--to:" not in str(found.exception)
