"""Training data: what becomes prompt and response, what the loss is taken on, what is refused and how it is named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nlora_surgery.errors import DataError, MissingExtraError, OptionError
from nlora_surgery.training.data import ALPACA, DataOptions, Examples, encode, layout_prompt, read_rows
from nlora_surgery.training.loading import load_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Shows what was answered before the last question only as a dot: a template that rewrites earlier turns.
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}>"
    "{{ '.' if m.role == 'assistant' and loop.revindex > 1 else m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(tiny_llama)


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(examples: Examples, tokenizer: Any) -> list[tuple[str, str]]:
    """Of each example, what is not trained and what is, by the tokenizer's own decoding."""

    def decode(row: dict[str, list[int]], trained: bool) -> str:
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        return str(tokenizer.decode([token for token, label in pairs if (label != -100) == trained]))

    return [(decode(row, False), decode(row, True)) for row in examples.rows]


@pytest.mark.parametrize(
    ("row", "options", "prompt", "response"),
    [
        ({"question": "Q?", "answer": "A."}, {}, ALPACA.format(instruction="Q?"), " A."),
        ({"instruction": "I", "output": "O"}, {}, ALPACA.format(instruction="I"), " O"),
        ({"prompt": "P: ", "completion": "C"}, {}, "P: ", "C"),
        ({"question": "Q?", "answer": "A."}, {"template": "raw"}, "Q?", "A."),
        ({"prompt": "P", "completion": "C"}, {"template": "alpaca"}, ALPACA.format(instruction="P"), " C"),
        ({"a": "P", "b": "C"}, {"prompt_field": "a", "completion_field": "b"}, ALPACA.format(instruction="P"), " C"),
        ({"text": "all of it"}, {}, "", "all of it"),
    ],
)
def test_layouts(
    tmp_path: Path, tokenizer: Any, row: dict[str, str], options: dict[str, str], prompt: str, response: str
) -> None:
    examples = encode(write(tmp_path / "d.jsonl", [row]), tokenizer, DataOptions(**options))
    begin, end = tokenizer.bos_token, tokenizer.eos_token
    expected = (begin + prompt, response + end) if prompt else ("", begin + response + end)
    assert texts(examples, tokenizer) == [expected]
    assert examples.trained_tokens == sum(label != -100 for label in examples.rows[0]["labels"][1:])
    assert examples.tokens == len(examples.rows[0]["input_ids"])


def test_an_input_is_part_of_the_alpaca_prompt(tmp_path: Path, tokenizer: Any) -> None:
    row = {"instruction": "Add", "input": "1 2", "output": "3"}
    [(prompt, response)] = texts(encode(write(tmp_path / "d.jsonl", [row]), tokenizer, DataOptions()), tokenizer)
    assert "### Input:\n1 2\n" in prompt
    assert response.startswith(" 3")
    del row["input"]
    [(prompt, _)] = texts(encode(write(tmp_path / "d.jsonl", [row]), tokenizer, DataOptions()), tokenizer)
    assert "### Input" not in prompt


def chat_tokenizer(model: Path, template: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    return tokenizer


TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]


def test_every_turn_of_a_conversation_is_trained(tmp_path: Path, tiny_llama: Path) -> None:
    tokenizer = chat_tokenizer(tiny_llama, CHAT)
    examples = encode(write(tmp_path / "d.jsonl", [{"messages": TALK}]), tokenizer, DataOptions())
    [(prompt, response)] = texts(examples, tokenizer)
    assert response == "b</assistant>\nd</assistant>\n"
    assert prompt == "<user>a</user>\n<assistant><user>c</user>\n<assistant>"
    # The oracle of the whole: the template's own rendering.
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(examples.rows[0]["input_ids"]) == whole


def test_a_pair_by_the_chat_template_ends_as_a_turn_does(tmp_path: Path, tiny_llama: Path) -> None:
    tokenizer = chat_tokenizer(tiny_llama, CHAT)
    path = write(tmp_path / "d.jsonl", [{"question": "a", "answer": "b"}])
    examples = encode(path, tokenizer, DataOptions(template="chat"))
    assert texts(examples, tokenizer) == [("<user>a</user>\n<assistant>", "b</assistant>\n")]


def test_of_a_template_that_forgets_only_the_last_turn_is_trained(tmp_path: Path, tiny_llama: Path) -> None:
    tokenizer = chat_tokenizer(tiny_llama, FORGETFUL)
    examples = encode(write(tmp_path / "d.jsonl", [{"messages": TALK}]), tokenizer, DataOptions())
    [(_, response)] = texts(examples, tokenizer)
    assert response == "d"


def test_csv_and_json_hold_the_same_rows_as_jsonl(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"question": 'say "hi", twice', "answer": "hi\nhi"}, {"question": "ä", "answer": "ö"}]
    write(tmp_path / "d.jsonl", rows)
    (tmp_path / "d.json").write_text(json.dumps({"data": rows}), encoding="utf-8")
    (tmp_path / "d.csv").write_text('question,answer\n"say ""hi"", twice","hi\nhi"\nä,ö\n', encoding="utf-8")
    encoded = [encode(str(tmp_path / f"d.{end}"), tokenizer, DataOptions()).rows for end in ("jsonl", "json", "csv")]
    assert encoded[0] == encoded[1] == encoded[2]


def test_long_examples_are_cut_dropped_or_refused_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "word " * 100}]
    rows.append({"prompt": "word " * 100, "completion": "c"})  # nothing of its response is left
    path = write(tmp_path / "d.jsonl", rows)
    cut = encode(path, tokenizer, DataOptions(max_length=20))
    assert (len(cut), cut.truncated, cut.dropped) == (2, 2, 1)
    assert len(cut.rows[1]["input_ids"]) == 20
    dropped = encode(path, tokenizer, DataOptions(max_length=20, too_long="drop"))
    assert (len(dropped), dropped.truncated, dropped.dropped) == (1, 0, 2)
    with pytest.raises(DataError, match=r"line 2 of d.jsonl has \d+ tokens, --max-length is 20"):
        encode(path, tokenizer, DataOptions(max_length=20, too_long="error"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", '{"question": "a", "answer": "b"}\n{"question": \n', "line 2 of d.jsonl is no JSON"),
        ("d.jsonl", "[1]\n", "line 1 of d.jsonl is no JSON object but list"),
        ("d.jsonl", '{"q": "a"}\n', "line 1 of d.jsonl has the fields q; expected one of"),
        ("d.jsonl", '{"question": "a", "answer": 3}\n', "line 1 of d.jsonl: the field 'answer' is int, no text"),
        ("d.jsonl", '{"messages": "hi"}\n', "messages must be a list"),
        ("d.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n', "nothing to train on"),
        ("d.jsonl", "\n\n", "holds no example"),
        ("d.json", '{"x": 1}', "holds no list of objects"),
        ("d.json", '{"x": 1}\n{"x": 2}', "is called .jsonl"),
        ("d.csv", "question,answer\na\n", "line 2 of d.csv has another number of fields"),
        ("d.txt", "x", "is of no known kind"),
        ("d.jsonl", b"\xff\xfe", "is no UTF-8"),
    ],
)
def test_bad_data_is_named_by_its_line(
    tmp_path: Path, tokenizer: Any, name: str, content: str | bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        encode(str(path), tokenizer, DataOptions())


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no data file"):
        list(read_rows(str(tmp_path / "missing.jsonl")))
    with pytest.raises(DataError, match="is a directory"):
        list(read_rows(str(tmp_path)))
    try:
        import datasets  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtraError, match="pip install"):
            list(read_rows("org/name"))


def test_a_chat_layout_without_a_template_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    tokenizer = chat_tokenizer(tiny_llama, "")
    with pytest.raises(DataError, match="needs a chat template"):
        encode(write(tmp_path / "d.jsonl", [{"messages": TALK}]), tokenizer, DataOptions())
    with pytest.raises(DataError, match="needs a chat template"):
        layout_prompt("hello", "chat", tokenizer)


def test_a_tokenizer_without_a_pad_token_gets_one(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token_id is not None


@pytest.mark.parametrize(
    "options",
    [{"template": "x"}, {"too_long": "x"}, {"max_length": 1}, {"prompt_field": "a"}],
)
def test_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        DataOptions(**options).check()
