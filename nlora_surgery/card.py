"""The card of what is pushed: what it is, what it was made from and how, its figures, how to load and to merge it."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nlora_surgery.adapter import Adapter
from nlora_surgery.manifest import summarize
from nlora_surgery.options import FAMILY_NYSTROM, STARTS_AT_ZERO
from nlora_surgery.targets import module_kind

__all__ = ["CardFacts", "card_body", "card_metadata", "own_text"]

_OURS = "<!-- written by nlora_surgery push -->"
_MARK = "<!-- nlora_surgery push: the README.md that was here before -->"

# What the card of a base says of the base alone: its evaluation, who may have it, what came after it.
_NOT_INHERITED = {"model-index", "eval_results", "model_name", "new_version", "base_model", "base_model_relation",
                  "library_name", "inference", "co2_eq_emissions", "tags"}  # fmt: skip

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}

_CITATION = """```bibtex
@inproceedings{guo-etal-2025-nlora,
  title         = {{NLoRA}: {Nystr\\"om}-Initiated Low-Rank Adaptation for Large Language Models},
  author        = {Guo, Chenlu and Chang, Yi and Wu, Yuan},
  booktitle     = {Findings of the Association for Computational Linguistics: EMNLP 2025},
  year          = {2025},
  eprint        = {2502.14482},
  archivePrefix = {arXiv},
  url           = {https://arxiv.org/abs/2502.14482}
}
```"""


@dataclass(frozen=True)
class CardFacts:
    """What a card tells.

    Attributes:
        repo_id: of the repository.
        revision: its branch; None is `main`.
        base: Hub id of the model that it was made from, if that is known, and `base_revision` its branch or tag.
        base_label: what to call that model.
        loaded_on: Hub id of the model that the adapter is put on: the base, or `repo_id` with a residual base.
        adapter: the adapter, or None for a merged model.
        folder: where the adapter lies in the repository, `""` for its root.
        task_type: PEFT's, which says how the model is loaded.
        manifest: of the directory, or of what training started from.
        training: the report of `train`.
    """

    repo_id: str
    revision: str | None = None
    base: str | None = None
    base_revision: str | None = None
    base_label: str = ""
    loaded_on: str | None = None
    adapter: Adapter | None = None
    folder: str = ""
    task_type: str | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] | None = None

    @property
    def with_residual_base(self) -> bool:
        """Whether the repository holds the adapter and the residual base that it belongs to."""
        return self.loaded_on == self.repo_id


def card_metadata(facts: CardFacts, inherited: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of the card.

    Args:
        facts: what is pushed.
        inherited: metadata of the card before, the base's or the directory's own: its license and languages are kept.
    """
    metadata: dict[str, Any] = {
        name: value
        for name, value in inherited.items()
        if name not in _NOT_INHERITED and not name.startswith("extra_gated")
    }
    is_model = facts.adapter is None or facts.with_residual_base
    tags = ["nlora"]
    if facts.adapter is not None:
        tags.append("slora" if facts.adapter.three_matrix else "lora")
    own = inherited.get("tags")
    if isinstance(own, list):
        tags += [str(tag) for tag in own if not str(tag).startswith("base_model:")]
    if facts.base is not None:
        metadata |= {"base_model": facts.base, "base_model_relation": "finetune" if is_model else "adapter"}
    metadata |= {"library_name": "transformers" if is_model else "peft", "tags": list(dict.fromkeys(tags))}
    if facts.task_type == "CAUSAL_LM":
        metadata.setdefault("pipeline_tag", "text-generation")
    return metadata


def card_body(facts: CardFacts, earlier: str) -> str:
    """The text of the card, in Markdown; the same for the same facts.

    Args:
        facts: what is pushed.
        earlier: the text of the README.md that was there before, which goes below.
    """
    sections = [_OURS, f"# {facts.repo_id.partition('/')[2]}", _what(facts), _properties(facts), *_figures(facts)]
    sections += ["## Load it", _loading(facts)]
    if facts.adapter is not None:
        sections += ["## Merge it", _merging(facts)]
    sections += ["## Citation", _CITATION]
    if earlier.strip():
        sections += [_MARK, earlier.strip()]
    return "\n\n".join(sections) + "\n"


def own_text(text: str) -> str:
    """Of a card's text the part that is not ours: all of it, unless it was written by an earlier push."""
    return text.partition(_MARK)[2] if _OURS in text else text


def _what(facts: CardFacts) -> str:
    base = _link(facts.base, facts.base_label)
    made = "nlora_surgery"
    if facts.adapter is None:
        return f"{base} with {_count(len(facts.manifest.get('adapters', ())), 'adapter')} merged into it by {made}."
    form = "three-matrix (SLoRA)" if facts.adapter.three_matrix else "LoRA"
    trained = ", trained" if facts.training is not None else ""
    if facts.with_residual_base and facts.manifest["options"]["method"] in STARTS_AT_ZERO:
        return f"{base}, with a {form} adapter in `{facts.folder}/` that starts at zero, made by {made}."
    if facts.with_residual_base:
        return (
            f"{base}, split by {made} into a residual base and a {form} adapter in `{facts.folder}/`: both together "
            "compute what the original does, to the rounding of what is stored. The residual base alone does not."
        )
    return f"A {form} adapter{trained} for {base}, made by {made}."


def _properties(facts: CardFacts) -> str:
    options, rows = facts.manifest.get("options", {}), [("base model", _link(facts.base, facts.base_label))]
    if facts.base_revision:
        rows.append(("its revision", f"`{facts.base_revision}`"))
    command = facts.manifest.get("command")
    if facts.adapter is None:
        weights = ", ".join(f"`{each['name']}` × {each['weight']:g}" for each in facts.manifest.get("adapters", ()))
        rows += [("method", "merge: weight + adapter, summed in fp32, rounded once"), ("adapters", weights)]
    else:
        config, adapter = facts.adapter.config, facts.adapter
        start = options.get("method") if command == "init" else config.extra.get("init_weights")
        how = {"extract": "extracted from a fine-tuned model", "convert": "converted"}.get(str(command))
        rows.append(("method", how or (f"`{start}`" if start else "LoRA")))
        if command == "init" and start in FAMILY_NYSTROM:
            rows.append(("sampling", f"`{options.get('sampling')}`"))
        if command == "init" and start not in STARTS_AT_ZERO:
            rows.append(("scale split", f"`{options.get('scale_split')}`"))
        if config.residual:
            rows.append(("residual", f"`{config.residual}`"))
        rows.append(("rank", _ranks(adapter)))
        alpha = f"{config.lora_alpha:g}" + (" (rsLoRA)" if config.use_rslora else "")
        rows += [("lora_alpha", alpha), ("targets", _targets(adapter))]
        rows.append(("parameters", f"{_parameters(adapter):,}"))
    if facts.manifest.get("tool"):
        rows.append(("made by", f"nlora_surgery {facts.manifest['tool'].get('version', '')}"))
    return _table(("", ""), rows)


def _figures(facts: CardFacts) -> list[str]:
    sections = []
    if facts.training is not None:
        report = facts.training
        rows = [("trained", f"{report.get('mode')}, {_count(report.get('steps') or 0, 'step')}"),
                ("trainable parameters", f"{report.get('trainable') or 0:,}"),
                ("loss of the last step", _figure(report.get("train_loss"), ".4f")),
                ("evaluation loss before", _figure(report.get("start_eval_loss"), ".4f")),
                ("evaluation loss after", _figure(report.get("eval_loss"), ".4f"))]  # fmt: skip
        sections += ["## Training", _table(("", ""), [row for row in rows if row[1] != "-"])]
    command = facts.manifest.get("command")
    if command == "init":
        means, _ = summarize(facts.manifest)
        header = ("module", "count", "r", "energy", "‖delta‖/‖weight‖", "drift")
        table = [
            (f"`{row['kind']}`", str(row["count"]), str(row["r"]), _figure(row["energy"], ".1%"),
             _figure(row["delta_ratio"], ".3f"), _figure(row["drift"], ".1e"))
            for row in means
        ]  # fmt: skip
        explained = (
            "Of the start, means by kind of module: the share of ‖weight‖² that the factors capture, their size, and "
            "how far what is stored plus the adapter is from the original."
        )
        sections += ["## Figures", explained, _table(header, table)]
    elif command == "merge":
        groups = _by_kind(facts.manifest["changed"], "delta_ratio", lambda each: each["tensor"].removesuffix(".weight"))
        sections += ["## Figures", _table(("module", "count", "mean ‖change‖/‖weight‖"), groups)]
    elif command in {"extract", "convert"}:
        groups = _by_kind(facts.manifest["modules"], "error", lambda each: each["module"])
        sections += ["## Figures", _table(("module", "count", "mean relative error"), groups)]
    return sections


def _by_kind(entries: Sequence[Mapping[str, Any]], figure: str, name: Any) -> list[tuple[str, str, str]]:
    groups: dict[str, list[float | None]] = {}
    for entry in entries:
        groups.setdefault(module_kind(name(entry)), []).append(entry.get(figure))
    rows = []
    for kind, all_values in groups.items():
        values = [value for value in all_values if value is not None]
        rows.append((f"`{kind}`", str(len(all_values)), _figure(statistics.fmean(values) if values else None, ".2e")))
    return rows


def _loading(facts: CardFacts) -> str:
    auto = _AUTO_CLASSES.get(facts.task_type or "", "AutoModel")
    here = _arguments(facts.repo_id, facts.revision)
    lines, after = [], ""
    if facts.adapter is None:
        lines = [f"from transformers import {auto}, AutoTokenizer", "", f"model = {auto}.from_pretrained({here})"]
        tokenizer = here
    else:
        base = here if facts.with_residual_base else _arguments(facts.loaded_on or "", facts.base_revision)
        folder = f', subfolder="{facts.folder}"' if facts.folder else ""
        if facts.adapter.three_matrix:
            lines = ["import nlora_surgery.peft_plugin  # makes SLORA a method of PEFT"]
            after = '\n\nThe plugin comes with `pip install "nlora-surgery[peft]"`.'
        lines += [
            "from peft import PeftModel",
            f"from transformers import {auto}, AutoTokenizer",
            "",
            f"model = {auto}.from_pretrained({base})",
            f"model = PeftModel.from_pretrained(model, {here}{folder})",
        ]
        tokenizer = base
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})")
    return "```python\n" + "\n".join(lines) + "\n```" + after


def _merging(facts: CardFacts) -> str:
    here = facts.repo_id + (f"@{facts.revision}" if facts.revision else "")
    base = here
    if not facts.with_residual_base:
        base = (facts.loaded_on or "") + (f"@{facts.base_revision}" if facts.base_revision else "")
    return f"```sh\nnlora_surgery merge {base} {here} -o merged\n```"


def _arguments(repo_id: str, revision: str | None) -> str:
    return f'"{repo_id}"' + (f', revision="{revision}"' if revision else "")


def _ranks(adapter: Adapter) -> str:
    ranks = sorted({adapter.shape(module).r for module in adapter.parts})
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}" if ranks else "-"


def _targets(adapter: Adapter) -> str:
    kinds = dict.fromkeys(re.sub(r"\W+$", "", module.rpartition(".")[2]) for module in adapter.parts)
    whole = [f"{name} (whole)" for name in adapter.replaced]
    return ", ".join(f"`{kind}`" for kind in [*kinds, *whole]) + f" ({_count(len(adapter.parts), 'module')})"


def _parameters(adapter: Adapter) -> int:
    trained = [name for parts in adapter.parts.values() for part, name in parts.items() if "_initial" not in part]
    return sum(math.prod(adapter.file.tensors[name].shape) for name in [*trained, *adapter.replaced.values()])


def _link(repo_id: str | None, label: str) -> str:
    return f"[{repo_id}](https://huggingface.co/{repo_id})" if repo_id else f"`{label}`" if label else "a local model"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:" if len(header) > 2 else "---"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)
