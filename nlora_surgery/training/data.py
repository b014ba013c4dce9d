"""Examples to train on: read from files, laid out as prompts and responses, turned into tokens and labels.

The loss is taken on the responses alone: the labels of everything else are -100. Prompt and response are
tokenized apart, so that the border between them is exact, and the response ends with the tokenizer's
end-of-sequence token.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from nlora_surgery.errors import DataError, MissingExtraError, OptionError

__all__ = ["ALPACA", "TEMPLATES", "TOO_LONG", "DataOptions", "Examples", "encode", "layout_prompt", "read_rows"]

# The prompt of Stanford Alpaca, in the form that PiSSA's and the paper's experiments use.
ALPACA: Final = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT: Final = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)

TEMPLATES: Final = ("auto", "alpaca", "chat", "raw")
TOO_LONG: Final = ("truncate", "drop", "error")

# Pairs of fields that hold a prompt and its response, and the template that `auto` takes for them.
_PAIRS: Final = (
    ("instruction", "output", "alpaca"),
    ("question", "answer", "alpaca"),
    ("query", "response", "alpaca"),
    ("prompt", "completion", "raw"),
)
_IGNORED: Final = -100


@dataclass(frozen=True, slots=True)
class DataOptions:
    """How rows become examples.

    Attributes:
        prompt_field, completion_field: fields of the row; None finds them among the known pairs, `messages`
            and `text`.
        template: `alpaca` wraps the prompt, `chat` takes the tokenizer's chat template, `raw` leaves it as it is;
            `auto` is `chat` for messages, `raw` for prompt and completion, `alpaca` for the other pairs.
        max_length: tokens of prompt and response together.
        too_long: what happens to an example with more: `truncate` cuts its end off, `drop` leaves it out,
            `error` ends the run. Counted in every case.
    """

    prompt_field: str | None = None
    completion_field: str | None = None
    template: str = "auto"
    max_length: int = 512
    too_long: str = "truncate"

    def check(self) -> None:
        """Refuse impossible values and contradictions.

        Raises:
            OptionError: which one.
        """
        if self.template not in TEMPLATES:
            raise OptionError(f"--template {self.template} is unknown; there are {', '.join(TEMPLATES)}")
        if self.too_long not in TOO_LONG:
            raise OptionError(f"--too-long {self.too_long} is unknown; there are {', '.join(TOO_LONG)}")
        if self.max_length < 2:
            raise OptionError(f"--max-length must be at least 2 tokens, not {self.max_length}")
        if (self.prompt_field is None) != (self.completion_field is None):
            raise OptionError("--prompt-field and --completion-field go together; give both")


@dataclass
class Examples:
    """Tokenized examples, and what happened on the way.

    Attributes:
        rows: each with `input_ids` and `labels` of one length; what a torch data loader takes.
        truncated: how many lost tokens at their end.
        dropped: how many were left out, for their length, or since nothing of their response was left.
        tokens: of all rows.
        trained_tokens: those that the loss is taken on.
    """

    rows: list[dict[str, list[int]]] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0
    tokens: int = 0
    trained_tokens: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stretch of an example's text, and whether it is trained."""

    text: str
    trained: bool


# --- reading ---------------------------------------------------------------------------------------------


def read_rows(source: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a data file or of a dataset on the Hub.

    Args:
        source: a `.jsonl`, `.json` (a list of objects, or one under `data`), `.csv` or `.parquet` file; or a Hub id
            `org/name`, with `:split` behind it (default `train`).

    Yields:
        Where the row stands, for messages (`line 3 of train.jsonl`), and the row.

    Raises:
        DataError: there is no such file, it is of no known kind, or a line is damaged, which is named.
        MissingExtraError: it takes the `datasets` package to read it.
    """
    path = Path(source)
    if path.is_dir():
        raise DataError(f"{source} is a directory; name a .jsonl, .json, .csv or .parquet file")
    if not path.exists():
        if "/" in source and not path.suffix and not source.startswith((".", "/")):
            yield from _hub_rows(source)
            return
        raise DataError(f"there is no data file {source}")
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{source} is of no known kind; expected {', '.join(readers)}, or a Hub id org/name")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is no UTF-8 text: {error.reason} at byte {error.start}") from error


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"line {number} of {path.name}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is no JSON: {error}") from error
            yield where, _object(row, where)


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON: {error}; one object per line is called .jsonl") from error
    if isinstance(rows, dict):
        rows = rows.get("data")
    if not isinstance(rows, list):
        raise DataError(f"{path} holds no list of objects, nor one under 'data'")
    for number, row in enumerate(rows, start=1):
        where = f"entry {number} of {path.name}"
        yield where, _object(row, where)


def _csv_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                where = f"line {reader.line_num} of {path.name}"
                if None in row or None in row.values():
                    raise DataError(f"{where} has another number of fields than the header")
                yield where, row
        except csv.Error as error:
            raise DataError(f"line {reader.line_num} of {path.name}: {error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    rows = _datasets(f"to read {path.name}").load_dataset("parquet", data_files=str(path), split="train")
    for number, row in enumerate(rows, start=1):
        yield f"row {number} of {path.name}", row


def _hub_rows(source: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    name, _, split = source.partition(":")
    datasets = _datasets(f"to read {source} from the Hub (there is no such local file)")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # of its many, whatever came: the dataset cannot be had
        raise DataError(f"cannot load the dataset {source}: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield f"row {number} of {source}", row


def _datasets(why: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(f'{why} takes the datasets package: pip install "datasets"') from error
    return datasets


def _object(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where} is no JSON object but {type(row).__name__}")
    return row


# --- layout ----------------------------------------------------------------------------------------------


def layout_prompt(prompt: str, template: str, tokenizer: Any) -> str:
    """A prompt as training lays it out, up to where the response begins.

    Args:
        prompt: what is asked.
        template: `alpaca`, `chat` or `raw`.
        tokenizer: has the chat template.

    Raises:
        DataError: `chat`, and the tokenizer has no template.
    """
    if template == "alpaca":
        return ALPACA.format_map({"instruction": prompt})
    if template == "chat":
        return _render(tokenizer, [{"role": "user", "content": prompt}], "the prompt", generate=True)
    return prompt


def _pieces(row: Mapping[str, Any], where: str, options: DataOptions, tokenizer: Any) -> list[_Piece]:
    if options.prompt_field is not None and options.completion_field is not None:
        pair = (options.prompt_field, options.completion_field, "alpaca")
    else:
        if "messages" in row:
            return _chat_pieces(row["messages"], where, tokenizer)
        found = next((known for known in _PAIRS if known[0] in row and known[1] in row), None)
        if found is None:
            if "text" in row:
                return [_Piece(_text(row, "text", where), trained=True)]
            pairs = "; ".join(f"{prompt}, {completion}" for prompt, completion, _ in _PAIRS)
            raise DataError(
                f"{where} has the fields {', '.join(map(str, row)) or '(none)'}; expected one of: {pairs}; messages; "
                "text; or name yours with --prompt-field and --completion-field"
            )
        pair = found
    prompt_field, completion_field, usual = pair
    prompt, completion = _text(row, prompt_field, where), _text(row, completion_field, where)
    template = usual if options.template == "auto" else options.template
    if template == "chat":
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return _chat_pieces(turns, where, tokenizer)
    further = _text(row, "input", where) if template == "alpaca" and row.get("input") else ""
    if further:
        laid_out = ALPACA_WITH_INPUT.format_map({"instruction": prompt, "input": further})
    else:
        laid_out = layout_prompt(prompt, template, tokenizer)
    if template == "alpaca":
        completion = f" {completion}"
    return [_Piece(laid_out, trained=False), _Piece(completion, trained=True)]


def _chat_pieces(messages: Any, where: str, tokenizer: Any) -> list[_Piece]:
    """A conversation by the tokenizer's template; what the assistant says is trained, in every turn."""
    whole = isinstance(messages, Sequence) and all(
        isinstance(each, Mapping) and isinstance(each.get("role"), str) and "content" in each for each in messages
    )
    if not whole or not messages or isinstance(messages, str):
        raise DataError(f"{where}: messages must be a list of objects with role and content")
    turns = [index for index, each in enumerate(messages) if each["role"] == "assistant"]
    if not turns:
        raise DataError(f"{where}: no message has the role assistant, so there is nothing to train on")
    pieces: list[_Piece] = []
    text = ""
    for index in turns:
        prompt = _render(tokenizer, messages[:index], where, generate=True)
        answered = _render(tokenizer, messages[: index + 1], where)
        if not (prompt.startswith(text) and answered.startswith(prompt)):
            # A template that rewrites earlier turns (it drops their reasoning, say): only the last can be trained.
            last = turns[-1]
            prompt = _render(tokenizer, messages[:last], where, generate=True)
            answered = _render(tokenizer, messages[: last + 1], where)
            if not answered.startswith(prompt):
                raise DataError(f"{where}: the chat template does not render the last answer behind its own prompt")
            return [_Piece(prompt, trained=False), _Piece(answered[len(prompt) :], trained=True)]
        pieces += [_Piece(prompt[len(text) :], trained=False), _Piece(answered[len(prompt) :], trained=True)]
        text = answered
    return pieces


def _render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], where: str, *, generate: bool = False) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{where} needs a chat template, and the model's tokenizer has none; use --template alpaca")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate))
    except Exception as error:  # a template is a program of its own, and raises what it likes
        raise DataError(f"{where}: the chat template refuses these messages: {error}") from error


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        found = "is missing" if name not in row else f"is {type(value).__name__}, no text"
        raise DataError(f"{where}: the field {name!r} {found}")
    return value


# --- tokens ----------------------------------------------------------------------------------------------


def encode(source: str, tokenizer: Any, options: DataOptions) -> Examples:
    """Read and tokenize all examples.

    Args:
        source: see `read_rows`.
        tokenizer: of the model.
        options: layout and lengths.

    Raises:
        DataError: see `read_rows`; a field is missing or no text; an example is too long where that is an error;
            no example is left.
        OptionError: see `DataOptions.check`.
    """
    options.check()
    examples = Examples()
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for where, row in read_rows(source):
        pieces = _pieces(row, where, options, tokenizer)
        chat = options.template == "chat" or (options.prompt_field is None and "messages" in row)
        ids: list[int] = []
        labels: list[int] = []
        for index, piece in enumerate(pieces):
            # A chat template writes its special tokens out, the one at the start included.
            tokens = list(tokenizer(piece.text, add_special_tokens=index == 0 and not chat)["input_ids"])
            if index == 0 and not chat and len(pieces) > 1 and tokens and end and tokens[-1] == end[0]:
                tokens.pop()  # a tokenizer that ends every text would end the prompt
            ids += tokens
            labels += tokens if piece.trained else [_IGNORED] * len(tokens)
        if not chat and ids[-1:] != end:
            ids, labels = ids + end, labels + end
        if len(ids) > options.max_length:
            if options.too_long == "error":
                raise DataError(f"{where} has {len(ids)} tokens, --max-length is {options.max_length}")
            if options.too_long == "drop":
                examples.dropped += 1
                continue
            examples.truncated += 1
            ids, labels = ids[: options.max_length], labels[: options.max_length]
        trained = sum(label != _IGNORED for label in labels[1:])  # the first token is predicted from nothing
        if not trained:
            examples.dropped += 1
            continue
        examples.rows.append({"input_ids": ids, "labels": labels})
        examples.tokens += len(ids)
        examples.trained_tokens += trained
    if not examples.rows:
        left_out = f"; {examples.dropped} were longer than --max-length {options.max_length}" * bool(examples.dropped)
        raise DataError(f"{source} holds no example to train on{left_out}")
    return examples
