"""push: a prepared checkpoint, an adapter or a merged model, checked whole, with its card, to the Hub."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from nlora_surgery.adapter import Adapter, task_type_of
from nlora_surgery.card import CardFacts, card_body, card_metadata, own_text
from nlora_surgery.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MANIFEST, Checkpoint, read_json
from nlora_surgery.errors import (
    AdapterError,
    CheckpointError,
    HubError,
    NonFiniteError,
    OptionError,
    VerificationError,
)
from nlora_surgery.factor import is_finite
from nlora_surgery.hub import Uploaded, base_metadata, check_repo_id, join_card, login, split_card, split_id, upload
from nlora_surgery.manifest import read_manifest
from nlora_surgery.rewrite import Progress
from nlora_surgery.surgery.verify import verify

__all__ = ["PushOptions", "PushPlan", "PushReport", "plan_push", "push"]

_CARD: Final = "README.md"
_RUN_OPTIONS: Final = "train_options.json"  # names the data by its local path, so it stays here
_RUN_REPORT: Final = "train_report.json"  # written last by train

# Beside an adapter only these go up: the directory may be a run, with checkpoints, logs that name this machine and
# whatever else the user keeps there.
_BESIDE_ADAPTER: Final = re.compile(
    r"LICENSE.*|NOTICE.*|train_report\.json|metrics\.jsonl|loss\.png|chat_template\.(jinja|json)|added_tokens\.json|"
    r"special_tokens_map\.json|tokenizer.*|vocab\.(json|txt)|merges\.txt|spiece\.model|generation_config\.json"
)
# Of a model everything goes up that belongs to it, but not these: hidden files, what training leaves, pickles (which
# can run code when read) and what was not finished.
_KEPT_BACK: Final = re.compile(
    r"(.*/)?(\.[^/]*|checkpoint-\d+|runs|__pycache__|(optimizer|scheduler|rng_state|training_args|scaler)[^/]*\.\w+|"
    r"train_options\.json|[^/]*\.(pkl|pickle|joblib|bin|pt|pth|ckpt|npz|unfinished|tmp|lock))(/.*)?"
)


@dataclass(frozen=True)
class PushOptions:
    """What `push` is asked for.

    Attributes:
        public: whether the repository is to be public; private otherwise.
        revision: branch to push to; `main` by default.
        create_pr: open a pull request instead.
        adapter_only: of a prepared checkpoint leave the residual base away.
        base_id: Hub id of the base, where the directory names it by a local path.
        message: of the commit.
    """

    public: bool = False
    revision: str | None = None
    create_pr: bool = False
    adapter_only: bool = False
    base_id: str | None = None
    message: str | None = None


@dataclass(frozen=True)
class PushPlan:
    """What `push` will do, decided before the Hub is asked.

    Attributes:
        directory: what is pushed.
        repo_id: where to.
        options: as given.
        kind: `prepared`, `adapter` or `merged`.
        files: by path in the repository: a local file, or a text that goes up in its place; the card is not among
            them.
        facts: what the card tells.
        inherited: metadata of a card that the directory, or a local base, holds.
        earlier: text of the directory's own README.md.
        check: compares what can be compared with what the manifest records.
    """

    directory: Path
    repo_id: str
    options: PushOptions
    kind: str
    files: Mapping[str, Path | str]
    facts: CardFacts
    inherited: Mapping[str, Any]
    earlier: str
    check: Callable[[Progress], None]

    def card(self, base: Mapping[str, Any] | None = None) -> str:
        """The card.

        Args:
            base: metadata of the base's card, of which the license and the languages are taken.
        """
        taken = {
            name: value
            for name, value in (base or {}).items()
            if name in {"license", "license_name", "license_link", "language", "pipeline_tag"}
        }
        inherited = {**taken, **self.inherited}
        return join_card(card_metadata(self.facts, inherited), card_body(self.facts, self.earlier))

    def sizes(self) -> dict[str, int]:
        """Bytes of every file that would be pushed, by path in the repository; the card as it is without the Hub."""
        contents: dict[str, Path | str] = {**self.files, _CARD: self.card()}
        return {
            name: content.stat().st_size if isinstance(content, Path) else len(content.encode())
            for name, content in sorted(contents.items())
        }


@dataclass(frozen=True)
class PushReport:
    """What a push came to.

    Attributes:
        user: whose token was used.
        files: bytes of every file by its path in the repository.
        uploaded: see `hub.Uploaded`.
    """

    user: str
    files: Mapping[str, int]
    uploaded: Uploaded


def plan_push(directory: Path, repo_id: str, options: PushOptions | None = None) -> PushPlan:
    """Open the directory, see that it is finished, and choose what goes up; nothing is asked of the Hub.

    Args:
        directory: an output of init, an adapter (a run of train, an output of convert or extract, or PEFT's), or an
            output of merge.
        repo_id: `org/name`.
        options: how.

    Raises:
        OptionError: options contradict each other, or the base has to be named.
        HubError: `repo_id` is no possible name.
        CheckpointError, AdapterError: the directory is none of these, damaged, or not finished.
    """
    options = options or PushOptions()
    check_repo_id(repo_id)
    if options.create_pr and options.revision not in {None, "main"}:
        raise OptionError(
            f"a pull request is always against main; leave away --create-pr or --revision {options.revision}"
        )
    if options.base_id is not None and split_id(options.base_id) is None:
        raise OptionError(f"--base-id {options.base_id} is no Hub id; write org/name or org/name@revision")
    if not directory.is_dir():
        raise CheckpointError(f"no directory at {directory}")
    if (directory / MANIFEST).exists():
        command = read_json(directory / MANIFEST).get("command")
        if command == "init":
            return _plan_prepared(directory, repo_id, options)
        if command == "merge":
            _refuse_adapter_only(options, directory)
            return _plan_merged(directory, repo_id, options)
    if (directory / ADAPTER_CONFIG).exists() or (directory / _RUN_OPTIONS).exists():
        _refuse_adapter_only(options, directory)
        return _plan_adapter(directory, repo_id, options)
    raise CheckpointError(
        f"{directory} is neither an output of init or merge ({MANIFEST}) nor an adapter ({ADAPTER_CONFIG}), or it was "
        "not finished"
    )


def push(plan: PushPlan, *, progress: Progress | None = None) -> PushReport:
    """Check the directory, write the card, send what the Hub does not have, and compare checksums with the Hub's.

    Args:
        plan: from `plan_push`.
        progress: listens to the check.

    Raises:
        VerificationError, NonFiniteError: the directory is not what was written.
        HubError: whatever the Hub or the way there does, in one sentence with what to do.
    """
    progress = progress or Progress()
    user = login(plan.repo_id)  # before the check, which reads everything
    plan.check(progress)
    base: Mapping[str, Any] | None = {}
    if plan.facts.base is not None and plan.facts.base != plan.repo_id:
        base = base_metadata(plan.facts.base, plan.facts.base_revision)
    if base is None and plan.facts.loaded_on == plan.facts.base:
        raise HubError(
            f"cannot push to {plan.repo_id}: the adapter's base {plan.facts.base} is no repository on the Hub that "
            "this login may see; name the right one by --base-id"
        )
    if base is None:  # a model is of use by itself, and its base may be a path that only looks like an id
        progress.notice(
            f"the card links no base: {plan.facts.base} is no repository that this login may see (--base-id)"
        )
        plan = replace(plan, facts=replace(plan.facts, base=None, base_revision=None))
    files: dict[str, Path | str] = {**plan.files, _CARD: plan.card(base)}
    what = {"prepared": "a prepared checkpoint", "adapter": "an adapter", "merged": "a merged model"}[plan.kind]
    uploaded = upload(
        files,
        plan.repo_id,
        private=not plan.options.public,
        message=plan.options.message or f"Upload {what} with nlora_surgery",
        revision=plan.options.revision,
        create_pr=plan.options.create_pr,
        notice=progress.notice,
    )
    return PushReport(user, plan.sizes() | {_CARD: len(str(files[_CARD]).encode())}, uploaded)


# --- the three kinds ----------------------------------------------------------------------------------------


def _plan_prepared(directory: Path, repo_id: str, options: PushOptions) -> PushPlan:
    manifest = read_manifest(directory)
    folder = manifest["adapter"]["folder"]
    adapter = Adapter.open(directory / folder)
    residual_base = manifest["options"]["residual"] == "baked"
    whole = residual_base and not options.adapter_only
    named = str(manifest["source"]["name"])
    source = _named_base(options.base_id or named)

    if residual_base and options.adapter_only:
        if options.base_id is None or options.base_id == named:
            raise OptionError(
                f"the adapter of {directory} belongs to the residual base beside it, not to {named}; push both without "
                "--adapter-only, or name the repository that holds that base by --base-id"
            )
    elif not residual_base and source is None:
        raise _no_base(adapter, named)

    base, base_revision = source or (None, None)
    inherited, earlier = _own_card(directory)
    facts = CardFacts(
        repo_id,
        options.revision,
        base,
        base_revision,
        _plain(named),
        repo_id if whole else base,
        adapter,
        "" if options.adapter_only else folder,
        adapter.config.task_type,
        manifest,
    )
    on = (repo_id, options.revision) if whole else (base, base_revision)
    files: dict[str, Path | str] = {}
    if whole:
        with Checkpoint.open(directory) as checkpoint:
            files |= _model_files(checkpoint)
    files |= _adapter_files(directory / folder, adapter, on, "" if options.adapter_only else f"{folder}/")
    if not options.adapter_only:  # the manifest describes the directory with the folder in it
        files[MANIFEST] = _public_manifest(manifest, options.base_id)

    def check(progress: Progress) -> None:
        failures = verify(directory, progress=progress).failures
        if failures:
            more = f" (and {len(failures) - 1} more findings)" if len(failures) > 1 else ""
            raise VerificationError(f"{directory} is damaged: {failures[0]}{more}; make it again")

    if not residual_base or not whole:
        inherited = {**_local_card(Path(named))[0], **inherited}
    return PushPlan(directory, repo_id, options, "prepared", files, facts, inherited, earlier, check)


def _plan_adapter(directory: Path, repo_id: str, options: PushOptions) -> PushPlan:
    training = None
    if (directory / _RUN_OPTIONS).exists():
        if not (directory / _RUN_REPORT).exists():
            raise AdapterError(f"{directory} is a run that was not finished; go on with it by train --resume")
        training = read_json(directory / _RUN_REPORT, AdapterError)
    adapter = Adapter.open(directory)
    named = adapter.config.base_model_name_or_path or ""
    revision = adapter.config.extra.get("revision")
    source = _named_base(options.base_id or (f"{named}@{revision}" if named and revision else named))
    if source is None:
        raise _no_base(adapter, named)
    manifest = _manifest_of(directory)
    inherited, earlier = _own_card(directory)
    if named and split_id(named) is None:
        inherited = {**_local_card(Path(named))[0], **inherited}
    facts = CardFacts(
        repo_id,
        options.revision,
        *source,
        _plain(named),
        source[0],
        adapter,
        "",
        adapter.config.task_type,
        manifest or _start_manifest(directory, named),
        training,
    )
    files = _adapter_files(directory, adapter, source, "")
    if manifest:
        files[MANIFEST] = _public_manifest(manifest, options.base_id)

    def check(_: Progress) -> None:
        missing = [each["module"] for each in manifest.get("modules", ()) if each["module"] not in adapter.parts]
        if missing:
            raise AdapterError(f"{directory} lacks {missing[0]}, which its {MANIFEST} records; make it again")
        for name in adapter.file.tensors:
            if not is_finite(adapter.file.tensor(name)):
                raise NonFiniteError(name, f"{directory}: {name} holds NaN or infinity; its training diverged")

    return PushPlan(directory, repo_id, options, "adapter", files, facts, inherited, earlier, check)


def _plan_merged(directory: Path, repo_id: str, options: PushOptions) -> PushPlan:
    manifest = read_json(directory / MANIFEST)
    checkpoint = Checkpoint.open(directory)
    named = str(manifest["source"]["name"])
    base, base_revision = _named_base(options.base_id or named) or (None, None)
    public = json.loads(_public_manifest(manifest, options.base_id))
    inherited, earlier = _own_card(directory)
    facts = CardFacts(
        repo_id,
        options.revision,
        base,
        base_revision,
        _plain(named),
        repo_id,
        task_type=task_type_of(checkpoint.config),
        manifest=public,
    )
    files = _model_files(checkpoint) | {MANIFEST: _public_manifest(manifest, options.base_id)}

    def check(progress: Progress) -> None:
        if checkpoint.fingerprint() != manifest["fingerprint"] or len(checkpoint.tensors) != manifest["tensors"]:
            raise VerificationError(
                f"{directory} is damaged: it is not the model that its {MANIFEST} records; merge again"
            )
        recorded = {name: crc for each in manifest["changed"] for name, crc in each["checksums"].items()}
        progress.start(sum(checkpoint.tensors[name].size_bytes for name in recorded if name in checkpoint.tensors))
        try:
            for name, crc in recorded.items():
                if zlib.crc32(checkpoint.raw(name)) != crc:
                    raise VerificationError(
                        f"{directory} is damaged: {name} is not what merge wrote, by its checksum; merge again"
                    )
                progress.advance(checkpoint.tensors[name].size_bytes)
                checkpoint.release(name)
        finally:
            progress.stop()

    return PushPlan(directory, repo_id, options, "merged", files, facts, inherited, earlier, check)


def _refuse_adapter_only(options: PushOptions, directory: Path) -> None:
    if options.adapter_only:
        raise OptionError(f"--adapter-only is for outputs of init, which {directory} is not; leave it away")


# --- the base -----------------------------------------------------------------------------------------------


def _named_base(name: str) -> tuple[str, str | None] | None:
    """A base's Hub id and revision; None for a local path, which means nothing on another machine."""
    return None if os.path.isdir(name) else split_id(name)  # noqa: PTH112  (Path.is_dir raises if it is too long)


def _no_base(adapter: Adapter, named: str) -> OptionError:
    found = f"names its base by the local path {named}" if named else "does not name its base"
    return OptionError(
        f"{adapter.directory / ADAPTER_CONFIG} {found}, which nobody else can load; give the base's Hub id by --base-id"
    )


def _plain(name: str) -> str:
    """A base's name without the directories above it, which are nobody else's business."""
    return name if split_id(name) is not None and not Path(name).exists() else Path(name).name


def _manifest_of(directory: Path) -> dict[str, Any]:
    """A manifest of ours, or an empty dict where there is none to be read."""
    try:
        manifest = read_json(directory / MANIFEST)
        return read_manifest(directory) if manifest.get("command") == "init" else manifest
    except (CheckpointError, OSError):
        return {}


def _start_manifest(directory: Path, base: str) -> dict[str, Any]:
    """The manifest of what a run started from: of its own init, or of the output of init that is its base."""
    found = _manifest_of(directory / "start") or (_manifest_of(Path(base)) if base else {})
    return found if found.get("command") == "init" else {}


def _public_manifest(manifest: Mapping[str, Any], base_id: str | None) -> str:
    """The manifest without paths of this machine."""
    source = manifest["source"]
    changes: dict[str, Any] = {"source": {**source, "name": base_id or _plain(str(source["name"]))}}
    if "adapters" in manifest:
        changes["adapters"] = [{**each, "name": _plain(str(each["name"]))} for each in manifest["adapters"]]
    return json.dumps({**manifest, **changes}, indent=1) + "\n"


# --- files --------------------------------------------------------------------------------------------------


def _model_files(checkpoint: Checkpoint) -> dict[str, Path | str]:
    """The shards that the index names and every other file of the model, by path in the repository."""
    names = [*checkpoint.files, *checkpoint.other_files()[0]]
    kept = [name for name in names if name != _CARD and _KEPT_BACK.fullmatch(name) is None]
    return {name: checkpoint.directory / name for name in kept}


def _adapter_files(
    directory: Path, adapter: Adapter, base: tuple[str | None, str | None], prefix: str
) -> dict[str, Path | str]:
    """An adapter's files by path in the repository; its configuration names the base as the Hub does."""
    config = directory / ADAPTER_CONFIG
    values = read_json(config, AdapterError)
    # PEFT's own field for the base's revision, which `org/name@revision` would not tell it.
    named = {"base_model_name_or_path": base[0]} | ({"revision": base[1]} if base[1] or "revision" in values else {})
    changed = {**values, **named}
    same = changed == values
    names = sorted(path.name for path in directory.iterdir() if path.is_file() and _BESIDE_ADAPTER.fullmatch(path.name))
    files: dict[str, Path | str] = {f"{prefix}{name}": directory / name for name in names}
    files[f"{prefix}{ADAPTER_WEIGHTS}"] = directory / ADAPTER_WEIGHTS
    files[f"{prefix}{ADAPTER_CONFIG}"] = config if same else json.dumps(changed, indent=2) + "\n"
    return files


def _own_card(directory: Path) -> tuple[dict[str, Any], str]:
    metadata, text = _local_card(directory)
    return metadata, own_text(text)


def _local_card(directory: Path) -> tuple[dict[str, Any], str]:
    """Metadata and text of a directory's README.md; nothing where there is none to be read."""
    try:
        return split_card((directory / _CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}, ""
