"""`nlora_surgery verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
from nlora_surgery_cli.render import ProgressBar, echo_json, echo_table, quiet_transformers

from nlora_surgery.errors import OptionError, VerificationError

__all__ = ["command"]


@click.command("verify")
@click.argument("prepared", type=click.Path(path_type=Path))
@click.option("--against", help="The original: a directory or a Hub id.  [default: checksums only]")
@click.option("--logits", is_flag=True, help="Also load both with transformers and compare their logits.")
@click.option(
    "--prompt", "prompts", multiple=True, help="For --logits; may be repeated.  [default: four built-in ones]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(prepared: Path, against: str | None, logits: bool, prompts: tuple[str, ...], as_json: bool) -> None:
    """Check that nothing was lost in PREPARED, an output of init.

    Against the original, every element of every adapted weight must lie within a bound computed from the
    dtypes, the rank and the sizes; everything else must be equal byte for byte.
    """
    if logits and against is None:
        raise OptionError("--logits needs --against ORIGINAL: there is nothing else to compare with")
    from nlora_surgery.hub import fetch
    from nlora_surgery.surgery.verify import PROMPTS, verify, verify_logits

    original = fetch(against) if against is not None else None
    with ProgressBar("verify") as progress:
        report = verify(prepared, original, progress=progress)
    comparison = None
    if logits and original is not None:
        quiet_transformers()
        comparison = verify_logits(prepared, original, prompts or PROMPTS)

    if as_json:
        found = asdict(report)
        if comparison is not None:
            found["logits"] = {**asdict(comparison), "passed": comparison.passed}
        echo_json(found)
    else:
        if report.modules:
            echo_table(
                ("module", "count", "max error", "of its bound", "drift"),
                [
                    (
                        row["kind"],
                        str(row["count"]),
                        f"{row['max_error']:.1e}",
                        f"{row['worst_share']:.2f}",
                        f"{row['drift']:.1e}",
                    )
                    for row in report.by_kind()
                ],
            )
        for line in report.checked:
            click.echo(f"checked: {line}")
        if comparison is not None:
            click.echo(
                f"logits over {comparison.positions} positions, fp32: max |difference| "
                f"{comparison.max_difference:.2e}, rms {comparison.rms_difference:.2e} (one more rounding: "
                f"{comparison.noise_rms:.2e}), mean KL {comparison.mean_kl:.1e} nats, same greedy token at "
                f"{comparison.greedy_agreement:.1%}"
            )
    failures = list(report.failures)
    if comparison is not None and not comparison.passed:
        failures.append(
            f"the {comparison.worst_output} differ by {comparison.worst_ratio:.3g} times what rounding explains"
        )
    if failures:
        more = f" (and {len(failures) - 3} more findings)" if len(failures) > 3 else ""
        raise VerificationError(f"{prepared} is not what it should be: {'; '.join(failures[:3])}{more}")
    if not as_json:
        whole = "nothing was lost" if original is not None else "it is as init wrote it"
        click.echo(f"OK: {prepared}: {whole}.")
