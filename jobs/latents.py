"""Filling the latent cache through Ray Data: a pool of actors that hold the VAE, one writer in the driver."""

import pyarrow as pa

from factory.training.task import ROW_COLUMNS, TrainingTask, load_rows, training_rows, usable_rows

ROWS_PER_BATCH = 8
BATCHES_PER_ACTOR = 8
"""An actor takes half a minute to start: it should have something to do."""


class LatentEncoder:
    """Encodes rows of the real table by image_id; holds the generator, so it is used in an actor."""

    def __init__(self, task: TrainingTask, device: str, num_threads: int | None = None) -> None:
        import torch

        from factory.training.latent_cache import encoder_of
        from factory.training.run import load_for_training

        if num_threads:
            torch.set_num_threads(num_threads)
        self._task = task
        self._encode = encoder_of(load_for_training(task, device))

    def __call__(self, keys: pa.Table) -> pa.Table:
        """Keys (image_id, flipped, hidden) → rows of the latent table."""
        from factory.imaging import decode_rows
        from factory.storage import open_table
        from factory.training.latent_cache import Variant, encode_rows

        table = open_table(self._task.real, version=self._task.real_version)
        wanted: dict[Variant, list[str]] = {}
        for key in keys.to_pylist():
            wanted.setdefault(Variant(key["flipped"], key["hidden"]), []).append(key["image_id"])
        done = []
        for variant, ids in wanted.items():
            listed = ", ".join(map(repr, ids))
            rows = decode_rows(
                table.read(ROW_COLUMNS, filter=f"split IN ('train', 'val') AND image_id IN ({listed})"),
                self._task.generator.resolution,
            )
            done.append(encode_rows(rows, self._encode, variant))
        return pa.concat_tables(done)


def fill_latents_by_ray(task: TrainingTask, *, num_workers: int, use_gpu: bool, num_cpus: int) -> int:
    """Encode the training and validation rows that the cache lacks; returns how many latents were computed.

    Ray must be running. The actors take the resources that the training workers take after them.
    """
    import ray.data

    from factory.training.latent_cache import add_latents, latents_uri, locked, missing_latents, variants_of
    from jobs.cluster import configure_data

    uri = latents_uri(task.real, task.generator)
    flips = (False, True) if task.settings.horizontal_flip else (False,)
    training = training_rows(task, load_rows(task, "train"))
    held_out = usable_rows(task, load_rows(task, "val"))
    with locked(uri):
        missing = missing_latents(uri, training, variants_of(task, flips))
        missing += missing_latents(uri, held_out, variants_of(task, (False,)))
        if not missing:
            return 0
        configure_data()
        names = [(row.image_id, *variant) for row, variant in missing]
        chunks = [names[start : start + ROWS_PER_BATCH] for start in range(0, len(names), ROWS_PER_BATCH)]
        # One block per batch: a table in one block would be encoded by one actor.
        blocks = [
            pa.table(dict(zip(("image_id", "flipped", "hidden"), map(list, zip(*chunk))))) for chunk in chunks
        ]
        encoded = ray.data.from_arrow(blocks).map_batches(
            LatentEncoder,
            fn_constructor_args=(task, "cuda" if use_gpu else "cpu", None if use_gpu else num_cpus),
            batch_format="pyarrow",
            batch_size=ROWS_PER_BATCH,
            compute=ray.data.ActorPoolStrategy(size=min(num_workers, -(-len(blocks) // BATCHES_PER_ACTOR))),
            num_cpus=0 if use_gpu else num_cpus * 0.9,  # the rest is for Ray Data's own tasks
            num_gpus=1 if use_gpu else 0,
        )
        return add_latents(uri, iter(encoded.iter_batches(batch_size=None, batch_format="pyarrow")))
