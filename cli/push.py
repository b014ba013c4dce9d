"""`nlora_surgery push`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
from nlora_surgery_cli.render import ProgressBar, bytes_text, echo_json, echo_table, warn

__all__ = ["command"]


@click.command("push")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repo_id")
@click.option("--public/--private", default=False, show_default="private", help="Who may see the repository.")
@click.option("--revision", help="Branch; made from main if it is not there.  [default: main]")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead; the repository must exist.")
@click.option("--adapter-only", is_flag=True, help="Of an output of init leave the residual base away.")
@click.option("--base-id", help="Hub id of the base, where DIR names it by a local path.")
@click.option("--message", "-m", help="Of the commit.")
@click.option("--dry-run", is_flag=True, help="Check DIR and list files and sizes; ask nothing of the Hub.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(
    directory: Path,
    repo_id: str,
    public: bool,
    revision: str | None,
    create_pr: bool,
    adapter_only: bool,
    base_id: str | None,
    message: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Push DIR to REPO_ID on the Hub, with a card.

    DIR is an output of init or merge, an adapter, or a run of train, without its checkpoints. It is checked
    before anything is sent, and the Hub's checksums after. What the Hub has is not sent again: the same command
    goes on with a push that broke off. The token is HF_TOKEN, or that of `hf auth login`.
    """
    from nlora_surgery.push import PushOptions, plan_push, push

    options = PushOptions(public, revision, create_pr, adapter_only, base_id, message)
    plan = plan_push(directory, repo_id, options)
    with ProgressBar("check") as progress:
        if dry_run:
            plan.check(progress)
        else:
            report = push(plan, progress=progress)
    if dry_run:
        sizes = plan.sizes()
        if as_json:
            echo_json({"repo_id": repo_id, "kind": plan.kind, "files": sizes, "card": plan.card()})
            return
        echo_table(("file", "bytes"), [(name, f"{size:,}") for name, size in sizes.items()])
        total = bytes_text(sum(sizes.values()))
        click.echo(f"Would push {len(sizes)} files, {total}, to {repo_id}. Nothing was sent.")
        return
    uploaded = report.uploaded
    if as_json:
        echo_json({"repo_id": repo_id, "user": report.user, "files": report.files, **asdict(uploaded)})
        return
    if uploaded.others:
        more = ", …" if len(uploaded.others) > 3 else ""
        warn(f"{repo_id} holds files that {directory} does not: {', '.join(uploaded.others[:3])}{more}")
    total = f"{len(report.files)} files, {bytes_text(sum(report.files.values()))}"
    if uploaded.changed:
        click.echo(f"Pushed {total}, as {report.user}; the checksums on the Hub are right.\n{uploaded.url}")
    else:
        click.echo(f"Nothing had to be sent: the Hub has all {total} already.\n{uploaded.url}")
