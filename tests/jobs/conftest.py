"""A small real table of phantoms and a generator folder on the shipped base, made once per session."""

import json
from pathlib import Path

import pytest

from factory.recipes import RECIPES


@pytest.fixture(scope="session")
def real_table(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`real.lance` of 60 phantoms in three splits, embedded by the shipped embedder."""
    from jobs.prepare import Args, run

    folder = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        run(Args(layout="phantom", out=str(folder / "real.lance"), num_images=60, seed=3))
    return str(folder / "real.lance")


@pytest.fixture(scope="session")
def generator_folder(tmp_path_factory: pytest.TempPathFactory, real_table: str) -> Path:
    """An untrained checkpoint of recipe `tiny`: a fresh ControlNet and adapter on the shipped base."""
    from factory.storage import open_table, real_digest

    folder = tmp_path_factory.mktemp("generator")
    loaded = RECIPES["tiny"]().generator.load()
    loaded.save(folder, {"name": "tiny", "real_digest": real_digest(open_table(real_table))})
    assert json.loads((folder / "generator.json").read_text())["recipe"]["name"] == "tiny"
    return folder


@pytest.fixture(scope="session")
def three_class_table(tmp_path_factory: pytest.TempPathFactory) -> str:
    """30 phantoms of benign, malignant and normal tissue, 24 of them in the training split."""
    from factory.datasets.phantom import BENIGN, MALIGNANT, NORMAL, PhantomConfig, phantom_sample
    from factory.embedding import ImageEmbedder
    from factory.imaging import encode_png
    from factory.storage import write_table
    from schemas.sample import RealSample, real_schema, table_of

    config = PhantomConfig(size=128, classes=(BENIGN, MALIGNANT, NORMAL))
    embedder = ImageEmbedder().load(num_threads=1)
    samples = [phantom_sample(config, 5, index) for index in range(30)]
    embeddings = embedder.embed([sample.image for sample in samples])
    rows = [
        RealSample(
            image_id=f"{number:032x}",
            dataset="phantom",
            source_path=f"{number}.png",
            group_id=f"patient-{number}",
            split="train" if number < 24 else "val",
            label=config.class_names.index(sample.label_name),
            label_name=sample.label_name,
            image=encode_png(sample.image),
            mask=encode_png(sample.mask),
            height=128,
            width=128,
            licence="none",
            allowed_use="tests",
            embedding=tuple(embedding.tolist()),
        )
        for number, (sample, embedding) in enumerate(zip(samples, embeddings))
    ]
    uri = str(tmp_path_factory.mktemp("three") / "real.lance")
    schema = real_schema(embedder.spec.dim)
    metadata = {"class_names": json.dumps(list(config.class_names)), "embedder": embedder.spec.to_json()}
    write_table(uri, table_of(rows, schema), schema, metadata=metadata)
    return uri
