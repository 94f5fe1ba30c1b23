"""What the stream costs: `factory synthesize` on Ray Data against the same stages in a plain loop.

    python benchmarks/overhead.py

Both sides make, embed, mark, encode and write the same images with the same number of compute threads for
synthesis. The stream's rate is counted from its first batch to its last commit, so starting Ray and loading
models is reported apart, not hidden in the ratio.
"""

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path

from measure import save


def plain_loop(args, jobs_args) -> float:
    """Images per second of the stages in one process."""
    from factory.storage import Committer, create_table, write_fragment
    from factory.synthesis.stages import ACCOUNTS, FinishStage, SynthesisStage
    from jobs.synthesis_plan import execution, prepare, table_metadata
    from schemas.sample import synthetic_schema

    prepared = prepare(jobs_args)
    _, synthesizer, finish = execution(jobs_args, prepared, args.threads, 0)
    stages = SynthesisStage(synthesizer, prepared.plan), FinishStage(finish)
    create_table(
        jobs_args.out, synthetic_schema(prepared.embedder_spec.dim), metadata=table_metadata(prepared)
    )
    indices = prepared.indices
    stages[1](stages[0](prepared.request_stage(indices[: args.batch_size])))
    start = time.perf_counter()
    with Committer(jobs_args.out, plan_id=prepared.plan.plan_id, run_id="plain") as committer:
        for first in range(0, len(indices), args.batch_size):
            rows = stages[1](stages[0](prepared.request_stage(indices[first : first + args.batch_size])))
            rows = rows.drop_columns(list(ACCOUNTS))
            committer.add(write_fragment(jobs_args.out, rows, run_id="plain"))
    return len(indices) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-requests", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    from factory.recipes import RECIPES
    from factory.storage import open_table, real_digest
    from jobs import prepare as prepare_job
    from jobs import synthesize

    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        real = str(Path(folder) / "real.lance")
        prepare_job.run(prepare_job.Args(layout="phantom", out=real, num_images=80))
        generator = Path(folder) / "generator"
        RECIPES["tiny"]().generator.load().save(
            generator, {"name": "tiny", "real_digest": real_digest(open_table(real))}
        )
        jobs_args = synthesize.Args(
            recipe="tiny",
            generator=str(generator),
            real=real,
            out=str(Path(folder) / "plain.lance"),
            num_requests=args.num_requests,
            batch_size=args.batch_size,
        )
        plain = plain_loop(args, jobs_args)
        result = synthesize.run(dataclasses.replace(jobs_args, out=str(Path(folder) / "stream.lance")))
        assert result is not None and result.pending == 0
    results = {
        "plain_images_per_second": plain,
        "stream_images_per_second": result.images_per_second,
        "ratio_stream_over_plain": result.images_per_second / plain,
        "stream_startup_seconds": result.startup_seconds,
    }
    path = save("overhead", vars(args), results, "cpu")
    print(
        f"plain loop {plain:.2f} images/s, stream {result.images_per_second:.2f} images/s: "
        f"ratio {results['ratio_stream_over_plain']:.2f}; start-up {result.startup_seconds:.0f} s; wrote {path}"
    )


if __name__ == "__main__":
    main()
