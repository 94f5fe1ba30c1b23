"""How many synthetic images of which class should join each batch? The class-adaptive sampler on a real classifier.

    factory explore sampler --real real.lance --synthetic synthetic.lance --out runs/sampler
    factory explore sampler --real real.lance --synthetic synthetic.lance --out runs/ablation \\
        --compare learned random fixed none --seeds 3

One agent per class moves its class's synthetic images per batch by −2, 0 or +2 (Chen et al. 2025). Each epoch trains
--episodes classifiers from one checkpoint as parallel Ray tasks; the best goes on. Two thirds of the validation groups
pay and choose in turn, the last third says which epoch is kept. --compare trains the ablations beside it: random
actions, fixed counts and no synthetic images, all with the same episodes, steps and seeds.

Running the same command again goes on after the last whole epoch and ends with the same result. The test split is not
read. With --reward paper --learning-rate 0.001 it is the paper's setting, under which the policy hardly moves.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

if TYPE_CHECKING:
    from factory.predictors.losses import TaskLoss
    from factory.tracking import Run
    from tune.sampler_search import EpisodeTraining, Epoch, Executor, SamplerSearch, SearchData

PolicyName = Literal["learned", "random", "fixed", "none"]
LossName = Literal["balanced_softmax", "cross_entropy", "logit_adjustment", "class_balanced_focal"]
RESULT_FILE = "results.json"


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `factory explore sampler`."""

    real: str
    """Real table; its training rows train, its validation rows pay, choose and stop."""
    synthetic: str | None = None
    """Synthetic table made from exactly those training rows; not needed for --policy none."""
    out: str
    """Folder of results, plot and checkpoints."""
    tag: str | None = None
    """Tag of the synthetic table; its newest version by default."""
    where: str = ""
    """Filter on synthetic rows, e.g. "label_name = 'malignant'"."""
    policy: PolicyName = "learned"
    """What chooses the counts."""
    compare: tuple[PolicyName, ...] = ()
    """Policies to train side by side at equal compute, instead of --policy."""
    seeds: int = 1
    """Seeds of each policy, from --seed on."""
    seed: int = 0
    """Of actions, batches, weights and folds."""
    epochs: int = 30
    """Epochs; one update of the policy each."""
    episodes: int = 3
    """Classifiers trained per epoch from one checkpoint."""
    steps_per_epoch: int = 50
    """Optimizer steps of an episode."""
    patience: int | None = None
    """Epochs without a better score of the last third after which a search stops; by default it trains all."""
    initial_count: int = 2
    """Synthetic images of each class in a batch at the start, and always under --policy fixed."""
    max_count: int = 16
    """Most synthetic images of a class in a batch."""
    learning_rate: float = 0.05
    """Of the policy. The paper's 0.001 moves a probability from .333 to at most .347 in 30 epochs."""
    reward: Literal["standardised", "paper"] = "standardised"
    """Validation scores standardised within the epoch's episodes, or the paper's (score + 0.04)³."""
    policy_form: Literal["logits", "mlp"] = "logits"
    """Three free numbers per agent, or a small network per agent on the counts of all classes."""
    gamma: float = 0.99
    """Weight of the newest mean reward in the baseline."""
    score: Literal["auc", "macro_f1", "balanced_accuracy", "log_likelihood"] = "auc"
    """Validation score."""
    same_episode_seed: bool = False
    """All episodes of an epoch train with one seed, so that their scores differ by the actions alone."""
    model: str = "mobilenetv2_100"
    """timm architecture of the classifier, with options as in "mobilenetv2_100?pad_type=same&mean=0.5&std=0.5"."""
    weights: str | None = None
    """Local safetensors file of pretrained weights."""
    size: int = 128
    """Side of the images, px; larger ones are letterboxed to it."""
    channels: Literal[1, 3] = 1
    """Channels of the images."""
    loss: LossName = "balanced_softmax"
    """Task loss; its class counts are those of the composed batch."""
    real_per_batch: int = 16
    """Real images in each batch; the synthetic ones come on top."""
    task_learning_rate: float = 1e-3
    """Of the classifier."""
    cpus_per_episode: float = 1.0
    """CPUs of each Ray task."""
    gpus_per_episode: float = 0.0
    """GPUs of each Ray task; with more than 0 it trains on one."""
    address: str | None = None
    """Ray cluster to join; a private Ray is started without it."""
    num_cpus: int | None = None
    """CPUs of a private Ray."""

    def __post_init__(self) -> None:
        for name in ("seeds", "steps_per_epoch", "real_per_batch", "size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: want at least 1")
        if self.cpus_per_episode <= 0 or self.gpus_per_episode < 0:
            raise ValueError("--cpus-per-episode must be positive and --gpus-per-episode not negative")
        if self.reward == "paper" and self.score == "log_likelihood":
            raise ValueError(
                "--reward paper takes a score in 0 … 1: use it with another --score than log_likelihood"
            )
        if self.synthetic is None and set(self.policies) != {"none"}:
            raise ValueError("--synthetic is needed, except for --policy none")

    @property
    def policies(self) -> tuple[PolicyName, ...]:
        """Those to train, each once."""
        return tuple(dict.fromkeys(self.compare)) or (self.policy,)


@dataclass(frozen=True, kw_only=True)
class ExploreResult:
    """Where the results are, and each search's own (`SamplerSearch.result`) by name."""

    out: Path
    searches: Mapping[str, Mapping[str, Any]]
    summary: Mapping[str, Mapping[str, Any]]
    seconds: float


def make_loss(name: LossName) -> "TaskLoss":
    """The task loss of that name with its default settings."""
    from factory.predictors import losses

    made: dict[LossName, TaskLoss] = {
        "balanced_softmax": losses.BalancedSoftmax(),
        "cross_entropy": losses.CrossEntropy(),
        "logit_adjustment": losses.LogitAdjustment(),
        "class_balanced_focal": losses.ClassBalancedFocal(),
    }
    return made[name]


def make_training(args: Args) -> "EpisodeTraining":
    """How each episode trains. No schedule: the rate must not restart with each of many short episodes."""
    from factory.predictors.classifiers import Classifier
    from factory.predictors.fitting import FitSettings
    from tune.sampler_search import EpisodeTraining

    return EpisodeTraining(
        predictor=Classifier(architecture=args.model, weights=args.weights),
        fit=FitSettings(
            num_steps=args.steps_per_epoch,
            learning_rate=args.task_learning_rate,
            warmup_steps=0,
            schedule="constant",
            loss=make_loss(args.loss),
        ),
        real_per_batch=args.real_per_batch,
        score=args.score,
    )


def make_searches(args: Args, training: "EpisodeTraining", data: "SearchData") -> dict[str, "SamplerSearch"]:
    """One search for each policy and seed; those that the folder holds go on.

    Raises:
        ValueError: settings that contradict each other, or a folder of another search.
    """
    from tune.class_adaptive import SamplerSettings
    from tune.policy import CountBounds, Learning
    from tune.sampler_search import SamplerSearch

    learning = Learning(
        form=args.policy_form, learning_rate=args.learning_rate, gamma=args.gamma, reward=args.reward
    )
    searches = {}
    for policy in args.policies:
        for seed in range(args.seed, args.seed + args.seeds):
            settings = SamplerSettings(
                policy=policy,
                num_epochs=args.epochs,
                num_episodes=args.episodes,
                initial_count=args.initial_count,
                bounds=CountBounds(high=args.max_count),
                learning=learning,
                # Under these two all episodes of one seed would be the same training.
                same_episode_seed=args.same_episode_seed and policy in ("learned", "random"),
                seed=seed,
            )
            name = f"{policy}-seed-{seed}"
            searches[name] = SamplerSearch(
                settings, training, data, Path(args.out) / name, patience=args.patience
            )
    return searches


def ray_executor(args: Args) -> "Executor":
    """Episodes as Ray tasks: the rows are put into the object store once, each checkpoint once per epoch."""
    import ray

    from tune.sampler_search import EpisodeJob, EpisodeResult, EpisodeTraining, SearchData

    train = ray.remote(num_cpus=args.cpus_per_episode, num_gpus=args.gpus_per_episode)(_train_in_task)
    held: dict[int, tuple[SearchData, Any]] = {}
    threads = max(1, int(args.cpus_per_episode))
    device = "cuda" if args.gpus_per_episode else "cpu"

    def execute(jobs: Sequence[tuple[EpisodeTraining, SearchData, EpisodeJob]]) -> list[EpisodeResult]:
        starts: dict[int, Any] = {}
        tasks = []
        for training, data, job in jobs:
            if id(data) not in held:
                held[id(data)] = (data, ray.put(data))
            start = None if job.start is None else starts.get(id(job.start))
            if job.start is not None and start is None:
                start = starts[id(job.start)] = ray.put(job.start)
            tasks.append(
                train.remote(training, held[id(data)][1], job.counts, job.seed, start, threads, device)
            )
        try:
            return ray.get(tasks)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause or error) from error

    return execute


def _train_in_task(
    training: "EpisodeTraining",
    data: "SearchData",
    counts: tuple[int, ...],
    seed: int,
    start: Any,
    threads: int,
    device: str,
) -> Any:
    import torch

    from tune.sampler_search import EpisodeJob, train_episode

    torch.set_num_threads(threads)
    return train_episode(training, data, EpisodeJob(counts=counts, seed=seed, start=start), device=device)


def run(args: Args) -> ExploreResult:
    """Train every search to its end.

    Raises:
        FileNotFoundError: a table is not there.
        ValueError: the synthetic rows were made from other real rows, too few validation groups, contradicting
            settings, a folder of another search, or a training that diverged.
    """
    from factory.tracking import track
    from jobs.cluster import start_ray
    from tune.sampler_search import run_searches

    started = time.perf_counter()
    data, inputs = read_data(args)
    searches = make_searches(args, make_training(args), data)
    with (
        track("explore sampler", execution_parameters=dataclasses.asdict(args), inputs=inputs) as tracked,
        start_ray(args.address, args.num_cpus),
    ):
        for name, epoch in run_searches(searches, ray_executor(args)):
            print(_epoch_line(name, searches[name], epoch), flush=True)
            _track_epoch(name, searches[name], epoch)
        result = _finish(args, searches, time.perf_counter() - started)
        _track_result(tracked, result)
    return result


def read_data(args: Args) -> tuple["SearchData", dict[str, Any]]:
    """The rows of both tables, after the check that the synthetic ones come from exactly these real ones.

    Returns:
        The rows, and what to record of the tables read.
    """
    from factory.evaluation.data import plan_ids, read_real, read_synthetic
    from factory.evaluation.leakage import check_real_budget, generator_records
    from factory.storage import open_table, real_digest
    from tune.sampler_search import make_search_data

    table = open_table(args.real)
    inputs: dict[str, Any] = {"real": f"{args.real}@{table.version}"}
    size, channels, version = args.size, args.channels, table.version
    real = read_real(args.real, ("train",), size=size, channels=channels, version=version)
    validation = read_real(args.real, ("val",), size=size, channels=channels, version=version)
    synthetic = None
    if args.synthetic is not None:
        made = open_table(args.synthetic, tag=args.tag)
        inputs["synthetic"] = f"{args.synthetic}@{made.version}"
        plans = plan_ids(args.synthetic, version=made.version, where=args.where)
        check_real_budget(args.synthetic, generator_records(made, plans), real_digest(table))
        synthetic = read_synthetic(
            args.synthetic,
            size=size,
            channels=channels,
            class_names=real.class_names,
            version=made.version,
            where=args.where,
        )
        if not len(synthetic):
            raise ValueError(
                f"{args.synthetic}: no accepted row{f' where {args.where}' if args.where else ''}; "
                "see `factory status` and `factory curate`"
            )
    return make_search_data(real, synthetic, validation, seed=args.seed), inputs


def _finish(args: Args, searches: Mapping[str, "SamplerSearch"], seconds: float) -> ExploreResult:
    from tune.sampler_results import counts_plot, summarise
    from tune.sampler_search import write_json

    out = Path(args.out)
    results = {name: search.result() for name, search in searches.items()}
    summary = summarise(results)
    write_json(
        out / RESULT_FILE,
        {"arguments": dataclasses.asdict(args), "summary": summary, "searches": results, "seconds": seconds},
    )
    for name, result in results.items():
        counts_plot(result).savefig(out / f"{name}.png", dpi=120)
    return ExploreResult(out=out, searches=results, summary=summary, seconds=seconds)


# ------------------------------------------------------------------------------------------ telling


def _epoch_line(name: str, search: "SamplerSearch", epoch: "Epoch") -> str:
    scores = " ".join(f"{score[epoch.record.reward_fold]:.3f}" for score in epoch.record.scores)
    counts = ", ".join(
        f"{search.data.train.class_names[label]} {count}"
        for label, count in zip(search.classes, epoch.record.counts)
    )
    return (
        f"{name} epoch {epoch.record.epoch + 1}/{search.settings.num_epochs}: episodes {scores}; "
        f"third fold {epoch.stop_score:.3f}; {counts}; {epoch.seconds:.0f} s"
    )


def _track_epoch(name: str, search: "SamplerSearch", epoch: "Epoch") -> None:
    """A nested run of the epoch, with one nested in it for each episode."""
    from factory.tracking import track

    names, record = search.data.train.class_names, epoch.record
    told = {
        "search": name,
        "policy": search.settings.policy,
        "seed": search.settings.seed,
        "epoch": record.epoch,
    }
    with track("explore sampler epoch", execution_parameters=told) as tracked:
        tracked.metrics(
            {
                "third_fold": epoch.stop_score,
                "best_episode": record.best,
                **{f"count.{names[k]}": count for k, count in zip(search.classes, record.counts)},
                **record.metrics,
            },
            step=record.epoch,
        )
        for episode, scores in zip(record.episodes, record.scores):
            with track(
                "explore sampler episode", execution_parameters={**told, "episode": episode.number}
            ) as one:
                one.metrics(
                    {
                        "reward_fold": scores[record.reward_fold],
                        "carry_over_fold": scores[1 - record.reward_fold],
                        **{f"count.{names[k]}": count for k, count in zip(search.classes, episode.counts)},
                    },
                    step=record.epoch,
                )


def _track_result(tracked: "Run", result: ExploreResult) -> None:
    tracked.metrics({f"score.{policy}": entry["score_mean"] for policy, entry in result.summary.items()})
    tracked.artifact(result.out / RESULT_FILE)
    for name in result.searches:
        tracked.artifact(result.out / f"{name}.png")


def print_result(result: ExploreResult) -> None:
    """A line per policy, what the comparison can and cannot say, and where the files are."""
    for policy, entry in result.summary.items():
        spread = (
            ""
            if entry["score_std"] is None
            else f" (SD over {entry['num_seeds']} seeds {entry['score_std']:.3f})"
        )
        print(f"{policy}: third fold {entry['score_mean']:.3f}{spread}; counts kept {entry['best_counts']}")
        if pairs := entry.get("difference_to_random"):
            print(f"  minus random actions, by seed: {', '.join(f'{value:+.3f}' for value in pairs)}")
    print(
        "the third fold picked the epochs, so its scores are too good for all alike; the test split was not read"
    )
    classifier = next(iter(result.searches.items()))
    print(
        f"wrote {result.out / RESULT_FILE}, a plot per search, and the classifiers, "
        f"e.g. {result.out / classifier[0] / classifier[1]['checkpoint']} ({result.seconds:.0f} s)"
    )


def command(argv: Sequence[str]) -> int:
    """`factory explore sampler`."""
    args = tyro.cli(Args, args=list(argv), prog="factory explore sampler", description=__doc__)
    print_result(run(args))
    return 0
