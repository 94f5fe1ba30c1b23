"""Keep a large table fast: merge its fragments, index what questions ask for, remove what no version names.

    factory maintain synthetic.lance
    factory maintain synthetic.lance --clean-older-than-days 7

Nothing that the table says changes, and tagged versions stay. A job that writes to the table is waited for by
nobody: the command stops and names it.
"""

import dataclasses
import datetime
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from factory.storage import Maintenance, check_table, maintain, open_table


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `factory maintain`."""

    table: tyro.conf.Positional[str]
    """Real or synthetic table."""
    compact: bool = True
    """Merge small fragments."""
    index: bool = True
    """Make the indexes of labels, verdicts, ids and (large tables) embeddings anew."""
    clean_older_than_days: float | None = None
    """Remove untagged versions, and files that no version names, older than this."""
    check: bool = False
    """Only read every fragment and name the damaged ones; exit status 1 where there are any."""


def run(args: Args) -> Maintenance:
    """Do what is asked for.

    Raises:
        FileNotFoundError: no such table.
        ValueError: a negative age.
        LeaseHeld: a job is writing to the table.
    """
    from factory.tracking import track

    age = args.clean_older_than_days
    if age is not None and not age >= 0:
        raise ValueError(f"--clean-older-than-days {age}: want 0 or more")
    with track(
        "maintain", execution_parameters=dataclasses.asdict(args), inputs={"table": args.table}
    ) as tracked:
        done = maintain(
            args.table,
            run_id=uuid.uuid4().hex,
            compact=args.compact,
            index=args.index,
            clean_older_than=None if age is None else datetime.timedelta(days=age),
        )
        tracked.metrics(
            {
                "fragments": done.fragments_after,
                "bytes_removed": done.bytes_removed,
                "indexes": len(done.indexed),
            }
        )
    return done


def _check(uri: str) -> int:
    """Print every damaged fragment of a table; returns how many there are."""
    found = 0
    for damage in check_table(open_table(uri)):
        found += 1
        print(damage)
    print(f"checked {uri}: {found} damaged")
    return found


def command(argv: Sequence[str]) -> int:
    """`factory maintain`."""
    args = tyro.cli(Args, args=list(argv), prog="factory maintain", description=__doc__)
    if args.check:
        return 1 if _check(args.table) else 0
    done = run(args)
    print(f"fragments  {done.fragments_before} → {done.fragments_after}")
    if done.indexed:
        print(f"indexed    {', '.join(done.indexed)}")
    if args.clean_older_than_days is not None:
        print(f"removed    {done.versions_removed} versions, {done.bytes_removed / 1e6:.1f} MB")
    print(f'maintained {args.table}; next: factory query {args.table} "accepted"')
    return 0
