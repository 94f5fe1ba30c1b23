"""Questions to a table of 10^6 rows: p50 and p95, without and with indexes, against Parquet and FAISS.

    python benchmarks/query.py                          # 10^6 rows with 64-d embeddings and no images

The table has the columns that questions use and unit embeddings of 64 numbers in 2,000 loose clusters; images would
not be read by any of these questions. Each question is asked with other values every time. Peers in the same run, on the
same rows: a Parquet file (one, with row groups of 65,536 rows) filtered by pyarrow.dataset, and for vectors a FAISS
flat index with an id selector for what passes the filter, all in memory. Ours reads from disk (its cache warm).
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
from measure import save

DIM = 64
RECIPES = tuple(f"recipe_{number}" for number in range(5))
LABELS = ("benign", "malignant", "normal")
BATCH = 100_000
COLUMNS = ["request_id", "label_name"]
Question = Callable[[np.random.Generator], Any]


def schema() -> pa.Schema:
    """The columns that questions use."""
    return pa.schema(
        [
            pa.field("request_id", pa.string(), nullable=False),
            pa.field("plan_id", pa.string(), nullable=False),
            pa.field("request_index", pa.int64(), nullable=False),
            pa.field("label_name", pa.string(), nullable=False),
            pa.field("recipe", pa.string(), nullable=False),
            pa.field("guidance_scale", pa.float32(), nullable=False),
            pa.field("stream_reject_reason", pa.string()),
            pa.field("embedding", pa.list_(pa.float32(), DIM), nullable=False),
        ]
    )


def make_batches(count: int) -> Iterator[pa.RecordBatch]:
    """Rows in order of request_index; 2 % are malignant, a quarter is rejected."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(2000, DIM)).astype(np.float32)
    for start in range(0, count, BATCH):
        size = min(BATCH, count - start)
        vectors = centres[rng.integers(0, 2000, size)] + 0.7 * rng.normal(size=(size, DIM)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        labels = rng.choice(len(LABELS), size, p=[0.78, 0.02, 0.2])
        reasons = np.array([None, "blank_image", "too_similar", "degenerate_mask"], object)
        yield pa.record_batch(
            [
                pa.array([request_id(index) for index in range(start, start + size)]),
                pa.array(["p" * 32] * size),
                pa.array(np.arange(start, start + size)),
                pa.array(np.array(LABELS, object)[labels]),
                pa.array(np.array(RECIPES, object)[rng.integers(0, 5, size)]),
                pa.array(rng.uniform(1, 9, size).astype(np.float32)),
                pa.array(reasons[rng.choice(4, size, p=[0.75, 0.1, 0.1, 0.05])]),
                pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIM),
            ],
            schema=schema(),
        )


def request_id(index: int) -> str:
    """32 hex characters that do not rise with the index."""
    return f"{index * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}"


def our_questions(table: Any, vectors: np.ndarray) -> dict[str, Question]:
    """Questions as users ask them; each takes a generator for its values."""

    def rare(rng: np.random.Generator) -> str:
        return f"label_name = 'malignant' AND accepted AND recipe = '{rng.choice(RECIPES)}'"

    def near(rng: np.random.Generator) -> np.ndarray:
        return vectors[rng.integers(len(vectors))]

    return {
        "one id": lambda rng: table.query(
            f"request_id = '{request_id(int(rng.integers(table_rows)))}'", columns=COLUMNS
        ),
        "count rare": lambda rng: table.count(rare(rng)),
        "rows rare": lambda rng: table.query(rare(rng), columns=COLUMNS),
        "range, first 100": lambda rng: table.query(
            f"guidance_scale < {rng.uniform(1.01, 1.2):.3f}", columns=COLUMNS, limit=100
        ),
        "vector": lambda rng: table.query(like=near(rng), columns=COLUMNS, k=10),
        "rare and vector": lambda rng: table.query(rare(rng), like=near(rng), columns=COLUMNS, k=10),
    }


def parquet_questions(path: Path) -> dict[str, Question]:
    """The same filters by pyarrow.dataset."""
    field = pyarrow.dataset.field
    dataset = pyarrow.dataset.dataset(path)

    def rare(rng: np.random.Generator) -> Any:
        accepted = field("stream_reject_reason").is_null()
        return (field("label_name") == "malignant") & accepted & (field("recipe") == str(rng.choice(RECIPES)))

    return {
        "one id": lambda rng: dataset.to_table(
            columns=COLUMNS, filter=field("request_id") == request_id(int(rng.integers(table_rows)))
        ),
        "count rare": lambda rng: dataset.count_rows(filter=rare(rng)),
        "rows rare": lambda rng: dataset.to_table(columns=COLUMNS, filter=rare(rng)),
        "range, first 100": lambda rng: dataset.scanner(
            columns=COLUMNS, filter=field("guidance_scale") < float(rng.uniform(1.01, 1.2))
        ).head(100),
    }


def faiss_questions(
    embeddings: np.ndarray, labels: np.ndarray, recipes: np.ndarray, rejected: np.ndarray
) -> tuple[Any, dict[str, Question]]:
    """Exact search in memory: all rows, or those that pass the filter by an id selector."""
    import faiss

    index = faiss.IndexFlatIP(DIM)
    index.add(embeddings)

    def near(rng: np.random.Generator) -> np.ndarray:
        return embeddings[rng.integers(len(embeddings))][None]

    def masked(rng: np.random.Generator) -> Any:
        passes = (labels == "malignant") & ~rejected & (recipes == str(rng.choice(RECIPES)))
        selector = faiss.IDSelectorBatch(np.flatnonzero(passes))
        return index.search(near(rng), 10, params=faiss.SearchParameters(sel=selector))  # type: ignore[call-arg]

    return index, {"vector": lambda rng: index.search(near(rng), 10), "rare and vector": masked}


def ask_in_turn(asked: dict[str, dict[str, Question]], times: int) -> dict[str, dict[str, dict[str, float]]]:
    """p50 and p95 in ms of every question to everyone, in turn, so that drift hits all alike; three to warm up."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(times + 3):
        for name in next(iter(asked.values())):
            for who, questions in asked.items():
                if name in questions:
                    rng = np.random.default_rng(number)
                    start = time.perf_counter()
                    questions[name](rng)
                    if number >= 3:
                        seconds.setdefault((who, name), []).append(time.perf_counter() - start)
    return {
        who: {
            name: {
                "p50": 1e3 * float(np.median(seconds[who, name])),
                "p95": 1e3 * float(np.quantile(seconds[who, name], 0.95)),
            }
            for name in questions
        }
        for who, questions in asked.items()
    }


def recall(table: Any, index: Any, embeddings: np.ndarray, queries: int = 100) -> float:
    """Share of FAISS's exact ten nearest that the table's vector index finds."""
    picked = np.random.default_rng(3).integers(0, len(embeddings), queries)
    _, exact = index.search(embeddings[picked], 10)
    hits = 0
    for number, row in enumerate(picked):
        found = table.query(like=embeddings[row], columns=["request_index"], k=10)[
            "request_index"
        ].to_pylist()
        hits += len(set(found) & set(exact[number].tolist()))
    return hits / (10 * queries)


table_rows = 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--times", type=int, default=30)
    args = parser.parse_args()
    import faiss

    from factory.storage import maintain, open_table, write_table

    global table_rows
    table_rows = args.rows
    faiss.omp_set_num_threads(1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        uri, parquet = str(Path(folder) / "synthetic.lance"), Path(folder) / "rows.parquet"
        write_table(uri, make_batches(args.rows), schema())
        with pa.parquet.ParquetWriter(parquet, schema()) as writer:
            for batch in make_batches(args.rows):
                writer.write_table(pa.Table.from_batches([batch]), row_group_size=65_536)
        rows = pa.parquet.read_table(
            parquet, columns=["embedding", "label_name", "recipe", "stream_reject_reason"]
        )
        embeddings = rows["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, DIM)
        index, searches = faiss_questions(
            embeddings,
            rows["label_name"].to_numpy(),
            rows["recipe"].to_numpy(),
            rows["stream_reject_reason"].is_valid().to_numpy(),
        )
        peers = {**parquet_questions(parquet), **searches}
        bare = our_questions(open_table(uri, version=open_table(uri).version), embeddings)
        start = time.perf_counter()
        results["indexed"] = list(maintain(uri, run_id="bench").indexed)
        results["index_seconds"] = time.perf_counter() - start
        table = open_table(uri)
        asked = {
            "ours without index, ms": bare,
            "ours with index, ms": our_questions(table, embeddings),
            "peer, ms": peers,
        }
        results |= ask_in_turn(asked, args.times)
        results["vector_index_recall_at_10"] = recall(table, index, embeddings)
    results["peer_over_ours_with_index_p50"] = {
        name: results["peer, ms"][name]["p50"] / results["ours with index, ms"][name]["p50"] for name in peers
    }
    for name, found in results.items():
        print(name, found)
    settings = vars(args) | {"width": f"{args.rows:.0e}".replace("+0", ""), "embedding_dim": DIM}
    print(f"wrote {save('query', settings, results, 'cpu')}")


if __name__ == "__main__":
    main()
