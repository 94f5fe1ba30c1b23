"""The rows that `factory evaluate downstream` reads before any held-out row is opened, and the checks of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.evaluate_plan import Plan, choose_arms

if TYPE_CHECKING:
    from factory.evaluation.arms import Arm
    from factory.evaluation.final_test import Comparison
    from factory.evaluation.leakage import GeneratorRecord
    from factory.predictors.examples import Examples
    from factory.predictors.fitted import Predictor
    from factory.predictors.settings import FitSettings
    from factory.storage import Table


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """The comparison, what the reader of its result should know, and what to record of the tables."""

    comparison: "Comparison"
    notes: tuple[str, ...]
    about: dict[str, Any]


def read_inputs(plan: Plan) -> Inputs:
    """Every row but the held-out ones, and every check that can be made without them.

    Raises:
        ValueError: leaks, too few rows of a class, one generator twice.
    """
    from factory.evaluation.data import read_real
    from factory.evaluation.downstream import Sources
    from factory.evaluation.final_test import Comparison, sealed
    from factory.evaluation.models import parse_loss, parse_model
    from factory.storage import open_table

    args = plan.args
    table = open_table(args.real)
    counts = {split: table.count(f"split = '{split}'") for split in ("train", "val", "test", "reserve")}
    for split in ("train", "val", "test"):
        if not counts[split]:
            raise ValueError(
                f"{args.real}: no row in the split {split}; prepare it with other --split-fractions"
            )
    options: dict[str, Any] = {
        "size": plan.training["size"],
        "channels": _channels(args.real),
        "version": table.version,
    }
    real, validation = (read_real(args.real, (split,), **options) for split in ("train", "val"))
    if (real.counts() == 0).any():
        lacking = real.class_names[int((real.counts() == 0).argmax())]
        raise ValueError(f"{args.real}: no training row of class {lacking}; a model cannot learn it")
    reserve = read_real(args.real, ("reserve",), **options) if counts["reserve"] else None
    for uri in args.external:
        _check_external(plan, uri, real.class_names)
    held_out = table.read(["image_id", "group_id", "label_name"], "split = 'test'")
    _check_judges(plan, args.real, held_out["label_name"].to_pylist(), real.class_names)
    predictor = parse_model(plan.task, plan.model, args.weights)
    arms, notes = choose_arms(plan, has_masks=real.masks is not None, has_reserve=reserve is not None)
    _check_losses(plan, predictor, arms)
    synthetic, ungated, sources = _read_synthetic(plan, arms, real)
    comparison = Comparison(
        arms=arms,
        sources=Sources(
            real=real,
            evaluation=sealed(held_out["image_id"].to_pylist(), held_out["group_id"].to_pylist(), real),
            validation=validation,
            reserve=reserve,
            synthetic=synthetic,
            ungated=ungated,
            round_trip=_round_trips(plan, arms, real),
        ),
        predictor=predictor,
        settings=_settings(plan, parse_loss(plan.task, args.loss)),
        task_seeds=tuple(range(args.seeds)),
    )
    about = {
        "real": {"uri": args.real, "version": table.version, **{f"{k}_rows": v for k, v in counts.items()}},
        "synthetic": sources,
    }
    notes = (*notes, *comparison.check())
    return Inputs(comparison=comparison, notes=notes, about=about)


def _check_losses(plan: Plan, predictor: "Predictor", arms: Sequence["Arm"]) -> None:
    """Refuse losses that would change nothing."""
    from factory.predictors.classifiers import FeatureProbe

    named = [arm.method for arm in arms if arm.method not in (None, "resampling")]
    if isinstance(predictor, FeatureProbe) and (plan.args.loss or named):
        raise ValueError(
            f"--model {plan.model}: a probe is a logistic regression and has no other loss; leave out "
            f"{plan.args.loss or named[0]}, or choose a network"
        )


def _check_external(plan: Plan, uri: str, class_names: Sequence[str]) -> None:
    """What can be known of an external table before it is opened.

    Raises:
        FileNotFoundError: no table there.
        ValueError: not a table of real images, the training table itself, too few classes in common, or no masks.
    """
    from factory.evaluation.data import match_classes
    from factory.storage import open_table

    table = open_table(uri)
    if not {"image_id", "split"} <= set(table.schema.names) or "embedder" not in table.metadata:
        raise ValueError(f"--external {uri}: not a table of real images; `factory prepare` makes one")
    if Path(uri).resolve() == Path(plan.args.real).resolve():
        raise ValueError(f"--external {uri}: is the table of --real")
    if plan.task == "classification":
        match_classes(plan.args.real, uri)
    found = table.read(["label_name"])["label_name"].to_pylist()
    _check_judges(plan, uri, found, class_names)
    if plan.task == "segmentation" and not table.count("mask IS NOT NULL"):
        raise ValueError(f"--external {uri}: none of its rows has a mask, so no segmentation can be scored")


def _check_judges(plan: Plan, uri: str, labels: Sequence[str], class_names: Sequence[str]) -> None:
    """Refuse rows that no AUC can be computed of; their labels may be read before the opening.

    Raises:
        ValueError: fewer than two of the classes that are learnt.
    """
    known = sorted(set(labels) & set(class_names))
    if plan.task == "classification" and len(known) < 2:
        raise ValueError(
            f"{uri}: of the classes {', '.join(class_names)} the rows that are to judge have only "
            f"{', '.join(known) or 'none'} (they are of {', '.join(sorted(set(labels)))}); AUC needs two"
        )


def _channels(uri: str) -> int:
    from factory.storage import real_rows

    kinds = real_rows(uri, splits=("train", "val"), columns=["photometric"])["photometric"].to_pylist()
    return 1 if set(kinds) <= {"grey"} else 3


def _settings(plan: Plan, loss: Any) -> "FitSettings":
    from factory.predictors.augmentation import Augmentation
    from factory.predictors.settings import FitSettings

    values = {k: v for k, v in plan.training.items() if k not in ("size", "augmentation")}
    return FitSettings(loss=loss, augmentation=Augmentation(kind=plan.training["augmentation"]), **values)


def _read_synthetic(
    plan: Plan, arms: Sequence["Arm"], real: "Examples"
) -> tuple[dict[int, "Examples"], dict[int, "Examples"], list[dict[str, Any]]]:
    """Accepted rows and all rows of each table, as many as any arm takes; what to record of the generators."""
    import numpy as np

    from factory.evaluation.data import plan_ids, read_synthetic
    from factory.evaluation.leakage import check_real_budget, generator_records, rows_digest
    from factory.storage import open_table

    wanted = [arm.added(real) for arm in arms if arm.uses_generator]
    most = np.max([np.zeros(real.num_classes, np.int64), *wanted], axis=0)
    limits = dict(zip(real.class_names, most.tolist(), strict=True))
    accepted, ungated = {}, {}
    about: list[dict[str, Any]] = []
    for number, uri in enumerate(plan.args.synthetic):
        table = open_table(uri, tag=plan.tag)
        options: dict[str, Any] = {"where": plan.where, "version": table.version}
        found = generator_records(table, plan_ids(uri, accepted_only=False, **options))
        check_real_budget(uri, found, rows_digest(real), scenario=plan.args.scenario)
        options |= {
            "size": real.size,
            "channels": real.channels,
            "class_names": real.class_names,
            "limits": limits,
        }
        accepted[number] = read_synthetic(uri, **options)
        if any(arm.kind == "ungated" for arm in arms):
            ungated[number] = read_synthetic(uri, accepted_only=False, **options)
        about.append(
            {
                "uri": uri,
                "version": table.version,
                "tag": plan.tag,
                "plans": [
                    asdict(record) | {"overrides": _overrides(table.metadata, record)} for record in found
                ],
                "backgrounds": _num_backgrounds(table, plan.where),
                "memorisation": _memorisation(table, plan.tag),
            }
        )
    _check_different(plan.args.synthetic, about)
    return accepted, ungated, about


def _overrides(metadata: Mapping[str, str], record: "GeneratorRecord") -> list[str]:
    found: list[str] = json.loads(metadata[f"plan.{record.plan_id}"]).get("overrides", [])
    return found


def _num_backgrounds(table: "Table", where: str) -> int:
    """Different real images that the usable rows keep pixels of."""
    from factory.evaluation.data import synthetic_filter

    found: set[str] = set()
    for batch in table.query_batches(synthetic_filter(where), columns=["background_id"], batch_size=1 << 16):
        found.update(name for name in batch.column(0).to_pylist() if name)
    return len(found)


def _check_different(uris: Sequence[str], about: Sequence[Mapping[str, Any]]) -> None:
    """Refuse the same generator under two names: it is no second seed."""
    seen: dict[str, str] = {}
    for uri, one in zip(uris, about, strict=True):
        weights = json.dumps(
            sorted({json.dumps(dict(plan["weights"]), sort_keys=True) for plan in one["plans"]})
        )
        if weights in seen:
            raise ValueError(
                f"--synthetic {uri}: made by the same generator weights as {seen[weights]}; intervals over generator "
                "seeds need generators trained with different seeds. Leave one out, or train another"
            )
        seen[weights] = uri


def _memorisation(table: "Table", tag: str | None) -> dict[str, Any]:
    """The verdict of the curation in force; says so where there is none."""
    from factory.export.card import curation_record

    found = curation_record(table, tag)
    text = table.metadata.get(f"memorisation.{found[0]}") if found is not None else None
    if text is None:
        return {"not_done": "no curation tested this version (factory curate)"}
    verdict: dict[str, Any] = json.loads(text)
    return verdict


def _round_trips(plan: Plan, arms: Sequence["Arm"], real: "Examples") -> dict[int, "Examples"]:
    from factory.evaluation.round_trip import examples_through_autoencoder
    from jobs.evaluate_images import load_autoencoder

    if not any(arm.kind == "vae_round_trip" for arm in arms):
        return {}
    if not plan.args.generator:
        raise ValueError("--arms vae_round_trip: give --generator for each synthetic table")
    return {
        number: examples_through_autoencoder(load_autoencoder(folder, plan.args.recipe, "cpu"), real)
        for number, folder in enumerate(plan.args.generator)
    }
