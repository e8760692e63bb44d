"""The key chat_template: what our templates render, where they are written, which one auto takes, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import TOKENIZER_CONFIG, changed, save_model, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

import merge_engine as me
from merge_engine.planning import MergePlan
from merge_engine.recipe.chat_template import BUILT_IN, problem_of_template, template_text

TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
CONVERSATIONS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXTS}),
    min_size=1,
    max_size=5,
)
MINE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are relative, so that messages show them as they are."""
    monkeypatch.chdir(tmp_path)


def rendered(template: str, messages: list[dict[str, str]], ask: bool) -> str:
    """What transformers makes of a template: it strips blocks, and gives these variables."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        messages=messages, add_generation_prompt=ask, bos_token="<s>", eos_token="</s>"
    )


def expected(name: str, messages: list[dict[str, str]], ask: bool) -> str:
    """The formats as they are documented for the models that they come from."""
    turns, system = [], ""
    for position, message in enumerate(messages):
        role, text = message["role"], message["content"]
        if name == "chatml":
            turns.append(f"<|im_start|>{role}\n{text}<|im_end|>\n")
        elif name == "llama3":
            head = "" if position else "<s>"
            turns.append(f"{head}<|start_header_id|>{role}<|end_header_id|>\n\n{text.strip()}<|eot_id|>")
        elif name == "exaone":
            head = "[|system|][|endofturn|]\n" if not position and role != "system" else ""
            turns.append(f"{head}[|{role}|]{text}" + ("\n" if role == "user" else "[|endofturn|]\n"))
        elif name == "mistral":
            head = "" if position else "<s>"
            if role == "system":
                turns.append(head)
                system = f"{text.strip()}\n\n"
            elif role == "user":
                turns.append(f"{head}[INST] {system}{text.strip()} [/INST]")
                system = ""
            else:
                turns.append(f"{head} {text.strip()}</s>")
        else:
            heads = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}
            end = "</s>" if role == "assistant" else ""
            turns.append(f"{heads[role]}{text.strip()}{end}\n\n")
    begins = {
        "chatml": "<|im_start|>assistant\n",
        "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "exaone": "[|assistant|]",
        "mistral": "",
        "alpaca": "### Response:\n",
    }
    return "".join(turns) + (begins[name] if ask else "")


@given(st.sampled_from(BUILT_IN), CONVERSATIONS, st.booleans())
@settings(max_examples=60)
def test_our_templates_render_the_documented_formats(
    name: str, messages: list[dict[str, str]], ask: bool
) -> None:
    assert problem_of_template(template_text(name)) is None
    assert rendered(template_text(name), messages, ask) == expected(name, messages, ask)


def merge(*models: Path, output: Path | None = None, **keys: Any) -> MergePlan:
    """Plan a merge, and carry it out if there is an output."""
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(model), "parameters": {"weight": 1}} for model in models],
        **keys,
    }
    planned = me.plan(recipe, output or "planned")
    if output is not None:
        me.run(recipe, output)
    return planned


LOADABLE = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": {"Hello": 0, "[UNK]": 1}, "unk_token": "[UNK]"},
    }
)

STORED = {
    "as text": {"tokenizer_config__json": changed(TOKENIZER_CONFIG, chat_template="old {{ messages }}")},
    "by name": {
        "tokenizer_config__json": changed(
            TOKENIZER_CONFIG,
            chat_template=[
                {"name": "default", "template": "old {{ messages }}"},
                {"name": "rag", "template": "x"},
            ],
        )
    },
    "as a file": {"chat_template__jinja": "old {{ messages }}"},
    "of a processor": {
        "chat_template__json": {"chat_template": "old {{ messages }}"},
        "tokenizer_config__json": changed(TOKENIZER_CONFIG, chat_template="old {{ messages }}"),
    },
    "nowhere": {},
    "nowhere, without a config": {"tokenizer_config__json": None},
}


@pytest.mark.parametrize("kind", STORED)
def test_a_template_is_written_where_the_donor_keeps_its_own(kind: str) -> None:
    donor = save_model(Path("donor"), 0, tokenizer__json=LOADABLE, **STORED[kind])
    planned = merge(donor, output=Path("out"), chat_template=MINE)
    assert planned.warnings == ()
    assert ("rag" in " ".join(planned.notes)) == (kind == "by name")
    before = {file.name for file in donor.iterdir()}
    added = {file.name for file in Path("out").iterdir()} - before
    assert added == {"README.md", "merge_manifest.json", "mergekit_config.yml"} | (
        {"chat_template.jinja"} if kind == "nowhere, without a config" else set()
    )
    texts = [file.read_text() for file in Path("out").iterdir() if file.suffix in (".json", ".jinja")]
    assert not any("old " in text for text in texts)
    in_config = "chat_template.jinja" not in added
    config = json.loads((Path("out") / "tokenizer_config.json").read_text()) if in_config else {}
    assert changed(config, "chat_template") == (TOKENIZER_CONFIG if in_config else {})
    loaded = pytest.importorskip("transformers").AutoTokenizer.from_pretrained("out")
    message = [{"role": "user", "content": "Hello"}]
    assert loaded.apply_chat_template(message, tokenize=False) == "Hello"


def test_templates_by_other_names_go_with_the_default() -> None:
    donor = save_model(Path("donor"), 0, **STORED["as a file"])
    (donor / "additional_chat_templates").mkdir()
    (donor / "additional_chat_templates" / "tool_use.jinja").write_text("old {{ messages }}")
    [note] = merge(donor, output=Path("out"), chat_template="alpaca").notes
    assert note.endswith("its templates by other names are left out: tool_use.jinja")
    assert not (Path("out") / "additional_chat_templates").exists()
    assert (Path("out") / "chat_template.jinja").read_text() == template_text("alpaca")
    assert not me.verify(Path("out")).findings
    kept = merge(donor, output=Path("kept"), chat_template="old {{ messages }}")  # which it has already
    assert kept.notes == () and (Path("kept") / "additional_chat_templates" / "tool_use.jinja").exists()


def test_auto_takes_the_most_common_one_and_of_several_the_first() -> None:
    texts = {"a": "A {{ messages }}", "b": "B {{ messages }}", "c": "B {{ messages }}\n", "d": None}
    models = [
        save_model(Path(name), i, **({"chat_template__jinja": text} if text else {}))
        for i, (name, text) in enumerate(texts.items())
    ]
    planned = merge(*models, output=Path("out"), chat_template="auto")
    assert planned.notes == ("chat_template: that of b, c",) and planned.warnings == ()
    assert (Path("out") / "chat_template.jinja").read_text() == "B {{ messages }}"
    tied = merge(models[1], models[0], models[3], chat_template="auto")
    assert tied.notes == ("chat_template: that of b; that of a is as common, but comes later",)
    assert tied.edits.written == {}  # the donor has it
    [warning] = merge(models[3], chat_template="auto").warnings
    assert warning == "chat_template: no input has a chat template, so the output has none"


def test_tokens_that_the_tokenizer_lacks_are_named() -> None:
    plain = save_model(Path("plain"), 0)
    [warning] = merge(plain, chat_template="chatml").warnings
    assert warning.startswith("chat_template: the output's tokenizer lacks tokens")
    assert warning.endswith(": <|im_start|>, <|im_end|>")
    own = {"<|im_start|>": 62, "<|im_end|>": 63}
    has = save_model(Path("has"), 0, tokenizer__json=tokenizer(added=own))
    decoder = {str(i): {"content": token} for token, i in own.items()}
    says = changed(TOKENIZER_CONFIG, added_tokens_decoder=decoder)
    later = save_model(Path("later"), 0, tokenizer_config__json=says)
    assert merge(has, chat_template="chatml").warnings == ()
    assert merge(later, chat_template="chatml").warnings == ()
    assert merge(plain, chat_template="mistral").warnings == ()  # [INST] may be text
    bare = save_model(Path("bare"), 0, tokenizer__json=None, tokenizer_config__json=None)
    [warning] = merge(bare, chat_template="chatml").warnings
    assert warning == "chat_template: the output has no tokenizer that could use it"


WRONG = {
    "chatlm": 'there is no template "chatlm"; did you mean "chatml"?',
    "vicuna!": 'there is no template "vicuna!"; give one of auto, alpaca, chatml, exaone, llama3, mistral, or Jinja',
    "{{ messages": "line 1 of the template: unexpected end of template",
    "\n{% for m in messages %}{{ m }}": "line 2 of the template: Unexpected end of template",
    "{{ messages | tojsn }}": 'line 1 of the template: there is no filter "tojsn"; did you mean "tojson"?',
    "{{ messages is odder }}": 'there is no test "odder"; did you mean "odd"?',
    "{{ 'hello' }}": 'is no chat template: it does not use "messages"',
    "{{ messages" + "(" * 5000: "the template is nested too deeply",
    "{{ messages[" + "9" * 5000 + "] }}": "a number in the template has thousands of digits",
    "{{ messages }}" + " " * 10**6: "has 1,000,014 characters; a chat template has at most 1,000,000",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:20])
def test_what_is_no_template_is_refused_before_any_input_is_looked_at(text: str) -> None:
    with pytest.raises(me.RecipeError) as caught:
        merge(Path("nowhere"), chat_template=text, seed=-1)
    problem, other = caught.value.problems
    assert problem.startswith("chat_template: ") and WRONG[text] in problem and other.startswith("seed")


def test_a_template_is_parsed_and_never_run() -> None:
    bomb = "{% for i in range(10**9) %}{{ 'x' * 10**9 }}{% endfor %}{{ messages.__class__.__mro__ }}"
    tags = "{% generation %}{{ messages }}{% endgeneration %}{% for m in messages %}{% break %}{% endfor %}"
    assert problem_of_template(bomb) is None and problem_of_template(tags) is None


def test_hostile_files_beside_the_weights_are_named() -> None:
    donor = save_model(Path("donor"), 0, tokenizer_config__json="{nonsense")
    with pytest.raises(me.MergeError, match=r"donor/tokenizer_config\.json: no valid JSON"):
        merge(donor, chat_template="alpaca")
