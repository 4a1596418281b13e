"""Results of the literature, measured anew with these instruments: what was claimed, what came out, and the verdict.

    python tests/benchmarks/reproductions [--only R07 R08] [--seeds 0 1 2] [--json | --markdown]

One thread; all of them take about four minutes. Seeds are those of data, initial weights and order of the batches. A
claim is reproduced when all its numbers are. A miss is a result: the exit code is 0.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence

import adam
import batchnorm
import descent
import minibatches
import torch
import warmup
from claim import Check, Claim

CLAIMS: dict[str, Claim] = dict(
    sorted((descent.CLAIMS | adam.CLAIMS | minibatches.CLAIMS | warmup.CLAIMS | batchnorm.CLAIMS).items())
)
Measured = tuple[str, list[Check], float]


def measure(names: Sequence[str], seeds: Sequence[int] | None) -> Iterator[Measured]:
    """Name, checks and seconds of each claim; runs that two claims share are made once."""
    for name in names:
        begun = time.perf_counter()
        checks = CLAIMS[name].measure(tuple(range(CLAIMS[name].seeds)) if seeds is None else tuple(seeds))
        yield name, checks, time.perf_counter() - begun


def verdict(checks: Sequence[Check]) -> str:
    missed = sum(check.verdict == "missed" for check in checks)
    return f"missed ({missed} of {len(checks)})" if missed else "reproduced"


def as_table(name: str, checks: Sequence[Check], seconds: float) -> str:
    lines = [f"{name}  {CLAIMS[name].words}: {verdict(checks)}  ({seconds:.0f} s; {CLAIMS[name].source})"]
    for check in checks:
        lines.append(f"  {check.verdict:10}  {check.quantity}  [{check.setting}]")
        lines.append(f"{'':14}{check.measured}   expected {check.expected}; {check.tolerance}")
    return "\n".join(lines)


def as_markdown(name: str, checks: Sequence[Check]) -> str:
    """Rows of docs/reproductions.md."""
    cells = (
        (name, check.quantity, check.setting, check.measured, check.expected, check.tolerance, check.verdict)
        for check in checks
    )
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def as_record(name: str, checks: Sequence[Check], seconds: float) -> dict[str, object]:
    claim = CLAIMS[name]
    return {
        "id": name, "claim": claim.words, "source": claim.source, "seconds": seconds,
        "verdict": verdict(checks), "checks": [check.as_dict() for check in checks],
    }  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CLAIMS, default=list(CLAIMS), metavar="ID", help=" ".join(CLAIMS))
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 1 2, more for R06, R11 and R16")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true")
    form.add_argument("--markdown", action="store_true", help="the rows of docs/reproductions.md")
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    records = []
    for name, checks, seconds in measure(given.only, given.seeds):
        if given.json:
            records.append(as_record(name, checks, seconds))
        else:
            print(as_markdown(name, checks) if given.markdown else as_table(name, checks, seconds), flush=True)
    if given.json:
        print(json.dumps(records, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
