"""Writing and random reading of image rows: our Lance table against Parquet and WebDataset shards, same bytes.

    python benchmarks/storage.py                        # 10,000 grey 128×128 PNGs, a few minutes on one core

Written: the encoded image, an id and a label per row. *lance* is one commit (`write_table`); *lance exactly once* is
the stream's path: fragments of 64 rows with a synced ledger record each, committed every 256 rows, which is what a
synthesize job pays. Read: batches of 32 images at random places, and one pass in order. A tar has no random
access: its members' offsets are listed first, in seconds given apart, and then sought.
"""

import argparse
import io
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.dataset
import pyarrow.parquet
from measure import median, save

ROWS_PER_SHARD = 1000


def make_rows(count: int, size: int) -> pa.Table:
    """Rows of the synthetic table's schema: speckle-like images, tiny embeddings."""
    from factory.imaging import encode_png
    from schemas.request import SynthesisPlan
    from schemas.sample import SyntheticSample, synthetic_schema, table_of

    plan = SynthesisPlan(
        recipe="bench", fingerprint="f" * 32, weights={}, real_digest="r", labels=("benign", "malignant")
    )
    rng = np.random.default_rng(0)
    mask = encode_png(np.zeros((size, size), np.uint8))
    tables = []
    for start in range(0, count, 1000):
        samples = []
        for index in range(start, min(start + 1000, count)):
            request = plan.request_at(index)
            pixels = np.clip(rng.rayleigh(40, (size, size)), 0, 255).astype(np.uint8)
            samples.append(
                SyntheticSample(
                    request_id=request.request_id,
                    plan_id=plan.plan_id,
                    request_index=index,
                    attempt=0,
                    recipe=plan.recipe,
                    fingerprint=plan.fingerprint,
                    weights={},
                    seed=0,
                    label=request.label_index,
                    label_name=request.label,
                    prompt="",
                    requested_mask=mask,
                    mask=mask,
                    image=encode_png(pixels),
                    height=size,
                    width=size,
                    licence="CC0",
                    num_inference_steps=1,
                    guidance_scale=1.0,
                    batch_size=1,
                    embedding=(1.0, 0.0),
                    scores={},
                    code_version="0",
                )
            )
        tables.append(table_of(samples, synthetic_schema(2)))
    return pa.concat_tables(tables)


def write_lance(rows: pa.Table, folder: Path) -> None:
    """One commit of everything."""
    from factory.storage import write_table

    write_table(str(folder / "whole.lance"), rows, rows.schema)


def write_exactly_once(rows: pa.Table, folder: Path) -> None:
    """The stream's path: a fragment and a record per 64 rows, a commit per 256."""
    from factory.storage import Committer, create_table, write_fragment

    uri = str(folder / "stream.lance")
    create_table(uri, rows.schema)
    with Committer(uri, plan_id=rows["plan_id"][0].as_py(), run_id="bench") as committer:
        for start in range(0, rows.num_rows, 64):
            committer.add(write_fragment(uri, rows.slice(start, 64), run_id="bench"))


def write_parquet(rows: pa.Table, folder: Path) -> None:
    """One file, row groups of 64 rows, no compression of what is compressed already."""
    pa.parquet.write_table(rows, folder / "rows.parquet", row_group_size=64, compression="none")


def write_tar(rows: pa.Table, folder: Path) -> None:
    """Shards of 1000 rows: NAME.png and NAME.cls, as WebDataset reads them."""
    for start in range(0, rows.num_rows, ROWS_PER_SHARD):
        part = rows.slice(start, ROWS_PER_SHARD)
        with tarfile.open(folder / f"shard-{start // ROWS_PER_SHARD:06d}.tar", "w") as tar:
            for row in part.select(["request_id", "image", "label"]).to_pylist():
                for suffix, content in (("png", row["image"]), ("cls", str(row["label"]).encode())):
                    member = tarfile.TarInfo(f"{row['request_id']}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def lance_reader(uri: str) -> Callable[[np.ndarray], list[bytes]]:
    """Images at positions, by Lance's take."""
    from factory.storage import open_table

    dataset = open_table(uri).dataset
    return lambda places: dataset.take(places.tolist(), columns=["image"])["image"].to_pylist()


def parquet_reader(path: Path) -> Callable[[np.ndarray], list[bytes]]:
    """Images at positions, by pyarrow.dataset's take."""
    dataset = pyarrow.dataset.dataset(path)

    def read(places: np.ndarray) -> list[bytes]:
        order = np.argsort(places)
        found = dataset.take(pa.array(places[order]), columns=["image"])["image"].to_pylist()
        return [found[position] for position in np.argsort(order)]

    return read


def tar_reader(folder: Path) -> tuple[Callable[[np.ndarray], list[bytes]], float]:
    """Images at positions, by offsets that are listed first; seconds of the listing."""
    start = time.perf_counter()
    places_of: list[tuple[Path, int, int]] = []
    for shard in sorted(folder.glob("shard-*.tar")):
        with tarfile.open(shard) as tar:
            places_of += [(shard, m.offset_data, m.size) for m in tar if m.name.endswith(".png")]
    seconds = time.perf_counter() - start

    def read(places: np.ndarray) -> list[bytes]:
        found = []
        for place in places:
            shard, offset, size = places_of[place]
            with shard.open("rb") as stream:
                stream.seek(offset)
                found.append(stream.read(size))
        return found

    return read, seconds


def pass_lance(uri: str) -> int:
    """Bytes of all images, in order."""
    from factory.storage import open_table

    return sum(
        pa.compute.sum(pa.compute.binary_length(b["image"])).as_py()
        for b in open_table(uri).batches(["image"])
    )


def pass_parquet(path: Path) -> int:
    """Bytes of all images, in order."""
    batches = pa.parquet.ParquetFile(path).iter_batches(1024, columns=["image"])
    return sum(pa.compute.sum(pa.compute.binary_length(batch["image"])).as_py() for batch in batches)


def pass_webdataset(folder: Path) -> int:
    """Bytes of all images, in order, by the webdataset package."""
    import webdataset

    shards = [str(path) for path in sorted(folder.glob("shard-*.tar"))]
    return sum(len(sample["png"]) for sample in webdataset.WebDataset(shards, shardshuffle=False))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=100)
    args = parser.parse_args()
    rows = make_rows(args.rows, args.size)
    megabytes = sum(len(item) for item in rows["image"].to_pylist()) / 1e6
    writers = {
        "lance": write_lance,
        "lance exactly once": write_exactly_once,
        "parquet": write_parquet,
        "webdataset": write_tar,
    }
    with tempfile.TemporaryDirectory() as root:
        write_seconds: dict[str, list[float]] = {name: [] for name in writers}
        for number in range(args.rounds):
            folder = Path(root) / str(number)
            folder.mkdir()
            for name, write in writers.items():
                start = time.perf_counter()
                write(rows, folder)
                write_seconds[name].append(time.perf_counter() - start)
        tar, index_seconds = tar_reader(folder)
        readers = {
            "lance": lance_reader(str(folder / "whole.lance")),
            "lance exactly once": lance_reader(str(folder / "stream.lance")),
            "parquet": parquet_reader(folder / "rows.parquet"),
            "webdataset": tar,
        }
        rng = np.random.default_rng(1)
        read_seconds: dict[str, list[float]] = {name: [] for name in readers}
        for number in range(args.batches):
            places = rng.integers(0, args.rows, 32)
            found = {}
            for name, read in readers.items():
                start = time.perf_counter()
                found[name] = read(places)
                read_seconds[name].append(time.perf_counter() - start)
            if number == 0:
                expected = rows["image"].take(pa.array(places)).to_pylist()
                assert found["lance"] == found["parquet"] == found["webdataset"] == expected
                # the exactly-once table has its rows in another order only if commits came in another order
                assert sorted(map(len, found["lance exactly once"])) == sorted(map(len, expected))
        passes: dict[str, list[float]] = {"lance": [], "parquet": [], "webdataset": []}
        for _ in range(args.rounds):
            for name, run in (
                ("lance", lambda: pass_lance(str(folder / "whole.lance"))),
                ("parquet", lambda: pass_parquet(folder / "rows.parquet")),
                ("webdataset", lambda: pass_webdataset(folder)),
            ):
                start = time.perf_counter()
                assert run() == round(megabytes * 1e6)
                passes[name].append(time.perf_counter() - start)
    results: dict[str, Any] = {
        "megabytes_of_images": megabytes,
        "write_rows_per_second": {name: args.rows / median(times) for name, times in write_seconds.items()},
        "random_read_ms_of_32": {
            name: {"p50": 1e3 * median(times), "p95": 1e3 * float(np.quantile(times, 0.95))}
            for name, times in read_seconds.items()
        },
        "tar_index_seconds": index_seconds,
        "pass_rows_per_second": {name: args.rows / median(times) for name, times in passes.items()},
    }
    results["write_ratio_exactly_once_over_parquet"] = (
        results["write_rows_per_second"]["lance exactly once"] / results["write_rows_per_second"]["parquet"]
    )
    results["random_read_ratio_parquet_over_lance"] = (
        results["random_read_ms_of_32"]["parquet"]["p50"] / results["random_read_ms_of_32"]["lance"]["p50"]
    )
    for name, figure in results.items():
        print(name, figure)
    print(f"wrote {save('storage', vars(args) | {'width': f'png{args.size}'}, results, 'cpu')}")


if __name__ == "__main__":
    main()
