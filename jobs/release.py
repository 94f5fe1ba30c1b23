"""Release a curated synthetic table: a tag, a folder with card and checksums, and a record of what was checked.

    factory release synthetic.lance --real real.lance --name v1 --base-licence openrail-m --out releases/v1

Refused while the generator memorises or was not tested, the search for copies was skipped, rows keep pixels of
patients, or a licence is unknown. `--force "REASON"` releases all the same; reason and obstacles are written into
the table and into release.json.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

if TYPE_CHECKING:
    from factory.export.release import ReleaseRecord

RELEASE = "release.json"


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `factory release`."""

    table: tyro.conf.Positional[str]
    """Synthetic table."""
    real: str
    """Real table that its generator was trained on."""
    name: str
    """Of the release; becomes a tag of the table, and is never moved."""
    out: str
    """Folder of the release."""
    base_licence: str = ""
    """Licence of the base weights, such as openrail-m."""
    format: Literal["folder", "nnunet", "huggingface", "webdataset", "coco"] = "webdataset"
    """Of the files."""
    force: str | None = None
    """Reason for releasing in spite of what stands in the way."""


def run(args: Args) -> "ReleaseRecord":
    """Check, tag, export and record.

    Raises:
        FileNotFoundError: a table is not there.
        ValueError: something stands in the way and is not forced; the name is taken or no name.
        FileExistsError: --out holds something.
    """
    from factory.export.destination import check_destination
    from factory.export.manifest import CHECKSUMS
    from factory.export.release import examine
    from factory.storage import open_table
    from factory.tracking import track
    from jobs import export

    table, real = open_table(args.table), open_table(args.real)
    if args.force is not None and not args.force.strip():
        raise ValueError("--force: want the reason, in words")
    if args.name in table.tags():
        raise ValueError(
            f"--name {args.name}: {args.table} has a release or tag of that name; choose another"
        )
    check_destination(args.out, overwrite=False)
    record = examine(table, real, name=args.name, base_licence=args.base_licence, forced=args.force)
    if record.obstacles and args.force is None:
        listed = "".join(f"\n  - {obstacle}" for obstacle in record.obstacles)
        raise ValueError(
            f'{args.table} cannot be released as it is:{listed}\nmend it, or give --force "REASON"'
        )
    with track(
        "release",
        execution_parameters=dataclasses.asdict(args),
        inputs={"synthetic": f"{args.table}@{table.version}", "real": f"{args.real}@{real.version}"},
    ) as tracked:
        done = export.run(
            export.Args(
                table=args.table, format=args.format, out=args.out, version=table.version, name=args.name
            )
        )
        table.tag(args.name)  # the version that was examined, whatever was written meanwhile
        text = json.dumps(dataclasses.asdict(record), indent=2, sort_keys=True)
        open_table(args.table).set_metadata({f"release.{args.name}": text})
        (Path(done.folder) / RELEASE).write_text(text + "\n")
        digest = hashlib.sha256((text + "\n").encode()).hexdigest()
        with (Path(done.folder) / CHECKSUMS).open("a") as stream:
            stream.write(f"{digest}  {RELEASE}\n")
        tracked.metrics({"rows": done.num_rows, "obstacles": len(record.obstacles)})
        tracked.set({"release": args.name, "output": done.folder, "forced": args.force or ""})
    return record


def command(argv: Sequence[str]) -> int:
    """`factory release`."""
    args = tyro.cli(Args, args=list(argv), prog="factory release", description=__doc__)
    record = run(args)
    for obstacle in record.obstacles:
        print(f"forced in spite of: {obstacle}")
    verdict = record.memorisation.get("verdict", "not tested")
    print(f"memorisation {verdict}; {record.near_copies} near copies left behind; curation {record.curation}")
    print(f"released {args.name} in {args.out}; check it by: cd {args.out} && sha256sum -c checksums.sha256")
    return 0
