"""Real tables of phantoms for the benchmarks: rows of a population of the caller's choice, split by patient."""

import json
from collections.abc import Mapping
from pathlib import Path

from factory.datasets.phantom import PhantomConfig, phantom_sample
from factory.embedding import ImageEmbedder
from factory.imaging import encode_png
from factory.storage import write_table
from schemas.identity import hash_parts
from schemas.sample import RealSample, real_schema, table_of


def write_phantoms(uri: Path, config: PhantomConfig, counts: Mapping[str, int], *, seed: int = 0) -> str:
    """A real table with `counts` images of each split, in the form that `factory prepare` writes."""
    embedder = ImageEmbedder().load(num_threads=1)
    splits = [split for split, count in counts.items() for _ in range(count)]
    samples = [phantom_sample(config, seed, index) for index in range(len(splits))]
    embeddings = embedder.embed([sample.image for sample in samples])
    rows = [
        RealSample(
            image_id=hash_parts("phantom", config.scanner.__repr__(), seed, number),
            dataset="phantom",
            source_path=f"phantom/{seed}/{number}",
            patient_id=f"phantom-{seed}-{number}",
            group_id=f"phantom-{seed}-{number}",
            split=split,
            label=config.class_names.index(sample.label_name),
            label_name=sample.label_name,
            image=encode_png(sample.image),
            mask=encode_png(sample.mask),
            height=config.size,
            width=config.size,
            licence="CC0-1.0",
            allowed_use="any",
            embedding=tuple(embedding.tolist()),
        )
        for number, (split, sample, embedding) in enumerate(zip(splits, samples, embeddings))
    ]
    schema = real_schema(embedder.spec.dim)
    metadata = {"class_names": json.dumps(list(config.class_names)), "embedder": embedder.spec.to_json()}
    write_table(str(uri), table_of(rows, schema), schema, metadata=metadata)
    return str(uri)
