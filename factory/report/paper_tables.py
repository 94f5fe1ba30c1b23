"""Tables in the form of the five papers, filled from the results at hand.

Rows and columns are the papers'; numbers are of the data, models and arms that were run, with 95 % intervals. A cell that
was not run says so and names the command; it is never left blank. Methods of others that the papers compare with
are not part of the factory and have no row.

Numbers of papers: 000 Chen et al. 2025 (long-tailed breast ultrasound), 001 Pan et al. 2025 (clinical prior), 002 Shentu
et al. 2025 (DiDGen), 003 Pan et al. 2025 (SCMG), 004 Xie et al. 2025 (MedDiff-FT).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from factory.report.tables import PaperTable, Record, Results, told


def paper_tables(records: Sequence[Record]) -> list[PaperTable]:
    """All tables, in the order of the papers."""
    results = Results(records)
    makers: list[Callable[[Results], PaperTable]] = [
        long_tail_methods, long_tail_ablation, generation_quality, lora_ranks, ratios, against_ordinary, classifiers,
        segmenters_by_scale, classification_mix, segmentation_mix, segmentation_models, post_processing, backgrounds,
    ]  # fmt: skip
    return [make(results) for make in makers]


_STARRED = "* differs from real data only (corrected p < 0.05). "


def _many(results: Results, task: str) -> list[tuple[Any, ...]]:
    return results.groups(task, "dataset", "model") or [("any", "any")]


_LONG_TAIL: dict[str, dict[str, Any]] = {
    "Baseline (Balanced Softmax)": {"loss": "balanced_softmax", "is_resampled": False},
    "Cross-entropy": {"loss": "cross_entropy", "is_resampled": False},
    "CBFocal": {"loss": "class_balanced_focal", "is_resampled": False},
    "Logit-Adjust": {"loss": "logit_adjustment", "is_resampled": False},
    "Re-sampling": {"loss": "cross_entropy", "is_resampled": True},
}
"""Methods of Table 1 of 000; each stands on real rows only and with synthetic ones."""


def _is_real(kind: str) -> bool:
    return kind in ("real", "class_balanced")


def long_tail_methods(results: Results) -> PaperTable:
    """Table 1 of 000."""
    metrics = {"F1": "macro_f1", "Rec": "macro_recall", "Pre": "macro_precision", "All": "accuracy",
               "Many": "many_shot_accuracy", "Med": "medium_shot_accuracy", "Few": "few_shot_accuracy"}  # fmt: skip
    table = PaperTable(
        title="Paper 000, Table 1: methods for the long tail",
        note="Percent, except FID and AUC. LIFT, ProCo, NCL, GLMC, MGDM and Skin-SDM are not part of the factory. FID as in "
        "`factory evaluate images`, whose features are named.",
        header=("dataset, model", "method", *metrics, "FID", "AUC"),
    )
    command, more = "--ratio 1 --methods all", "--ratio 1 # with reserve rows: factory prepare --num-train N"
    methods: dict[str, tuple[dict[str, Any], str]] = {}
    for name, want in _LONG_TAIL.items():
        methods[name] = ({"kind": _is_real, **want}, command)
        methods[f"{name} + synthetic"] = ({"kind": "synthetic", "only": False, **want}, command)
    methods["Cross-entropy + as many more real images"] = ({"kind": "oracle", "loss": "cross_entropy"}, more)
    for dataset, model in _many(results, "classification"):
        for name, (want, options) in methods.items():
            line = results.find(task="classification", dataset=dataset, model=model, place="test", **want)
            model_option = "" if model == "any" else f"--model {model} "
            missing = (
                table.not_run(results.downstream("classification", model_option + options))
                if line is None
                else ""
            )
            cells = [told(line, metric) or missing for metric in (*metrics.values(), "auc")]
            fid = "–"
            if want["kind"] == "synthetic":
                fid = (line and results.fid_of(line)) or table.not_run(results.images_command())
            table.rows.append((f"{dataset}, {model}", name, *cells[:-1], fid, cells[-1]))
    return table


def long_tail_ablation(results: Results) -> PaperTable:
    """Table 2 of 000."""
    metrics = {"F1": "macro_f1", "Rec": "macro_recall", "Pre": "macro_precision", "All": "accuracy",
               "Many": "many_shot_accuracy", "Med": "medium_shot_accuracy", "Few": "few_shot_accuracy"}  # fmt: skip
    table = PaperTable(
        title="Paper 000, Table 2: ablation",
        note="Percent. SynSketch is the recipe sketch_ldm, SynClass any other. The sampler (RL-CAS) is scored on validation "
        "rows by `factory explore sampler`, not on the test split, so its numbers stand in its own results"
        + (" (below)." if results.has_sampler else "."),
        header=("dataset, model", "method", *metrics),
    )

    def has_sketch(names: tuple[str, ...]) -> bool:
        return any(name.startswith("sketch_ldm") for name in names)

    rows: dict[str, tuple[dict[str, Any], str]] = {
        "Baseline": ({"kind": "real"}, "--ratio 1"),
        "+SynClass": ({"kind": "synthetic", "recipes": lambda names: not has_sketch(names)}, "--ratio 1"),
        "+SynSketch": (
            {"kind": "synthetic", "recipes": has_sketch},
            "--ratio 1 # a table of recipe sketch_ldm",
        ),
        "Re-sampling": ({"kind": _is_real, "is_resampled": True}, "--ratio 1"),
    }
    for dataset, model in _many(results, "classification"):
        for name, (want, options) in rows.items():
            line = results.find(task="classification", dataset=dataset, model=model, place="test", **want)
            missing = table.not_run(results.downstream("classification", options)) if line is None else ""
            table.rows.append(
                (f"{dataset}, {model}", name, *(told(line, m) or missing for m in metrics.values()))
            )
        sampler = table.not_run(
            f"factory explore sampler --real {results.real} --synthetic {results.synthetic} --out FOLDER"
        )
        table.rows.append((f"{dataset}, {model}", "+Syn+RL-CAS", *[sampler] * len(metrics)))
    return table


def generation_quality(results: Results) -> PaperTable:
    """Table 1 of 001, with the lines of Table 1 of 002."""
    names = [
        ", ".join(r["synthetic"]["recipes"]) + f" ({r['synthetic']['uri'].rpartition('/')[2]})"
        for r in results.images
    ]
    table = PaperTable(
        title="Paper 001, Table 1: quality of generation",
        note="One column for each synthetic table. Values do not compare with the papers': features, resizing and N differ, "
        "and are named. MS-SSIM and LPIPS (Table 1 of 002) among synthetic images of one class.",
        header=("metric", *(names or ["none"])),
    )
    missing = None if results.images else table.not_run(results.images_command())
    for metric in ("fid", "kid"):
        cells = [results.image_score(r, metric) or "not computed: too few images" for r in results.images]
        table.rows.append((metric.upper(), *(cells or [missing or ""])))
    for metric, name in (("ms_ssim", "MS-SSIM"), ("lpips", "LPIPS")):
        command = results.images_command("--lpips-backbone vgg16.pth --lpips-linear vgg.pth ")
        cells = [results.image_mean(r, metric) or table.not_run(command) for r in results.images]
        table.rows.append((name, *(cells or [missing or ""])))
    return table


def lora_ranks(results: Results) -> PaperTable:
    """Table 2 of 001."""
    table = PaperTable(
        title="Paper 001, Table 2: low-rank adaptation",
        note="One row for each result of `factory evaluate images --generator`; parameters are those that were trained.",
        header=("model", "rank", "FID", "KID", "trained parameters"),
    )
    for record in results.images:
        if (generator := record["generator"]) is None:
            continue
        rank = generator["lora_rank"]
        scores = [results.image_score(record, m) or "not computed: too few images" for m in ("fid", "kid")]
        kind = "with LoRA" if rank else f"UNet {generator['unet']}"
        table.rows.append(
            (
                f"{generator['recipe']}, {kind}",
                str(rank or "-"),
                *scores,
                f"{generator['parameters'] / 1e6:.2f} M",
            )
        )
    found = {row[1] for row in table.rows}
    for rank in ("-", "2", "4", "8"):
        if rank not in found:
            kind = "fully fine-tuned" if rank == "-" else "with LoRA"
            option = (
                "" if rank == "-" else f"  # CHECKPOINT: factory train --adapt-from BASE --lora-rank {rank}"
            )
            cell = table.not_run(results.images_command("--generator CHECKPOINT ") + option)
            table.rows.append((kind, rank, cell, cell, cell))
    return table


def _places(results: Results, task: str) -> list[str]:
    return [place for (place,) in results.groups(task, "place")] or ["test"]


_TASKS = {"classification": "auc", "segmentation": "dice"}


def ratios(results: Results) -> PaperTable:
    """Table 3 of 001."""
    places = {task: _places(results, task) for task in _TASKS}
    table = PaperTable(
        title="Paper 001, Table 3: real-to-synthetic ratios",
        note=_STARRED
        + "Classification: AUC; segmentation: Dice in percent at native size. test: of the training dataset; "
        "other columns: other datasets.",
        header=(
            "train",
            "model",
            "real:synthetic",
            *(f"{task} {place}" for task in _TASKS for place in places[task]),
        ),
    )
    wanted: dict[str, tuple[dict[str, Any], str]] = {
        "Real only": ({"kind": "real"}, "1 2 4 8 only"),
        **{
            f"1:{n}": ({"kind": "synthetic", "only": False, "ratio": float(n)}, "1 2 4 8 only")
            for n in (1, 2, 4, 8)
        },
        "Synthetic only": ({"kind": "synthetic", "only": True}, "1 2 4 8 only"),
    }
    datasets = list(
        dict.fromkeys(pair for task in _TASKS for pair in results.groups(task, "dataset", "model"))
    )
    for dataset, model in datasets or [("any", "any")]:
        for name, (want, option) in wanted.items():
            cells = []
            for task, metric in _TASKS.items():
                for place in places[task]:
                    line = results.find(task=task, dataset=dataset, model=model, place=place, **want)
                    cells.append(
                        told(line, metric)
                        or table.not_run(results.downstream(task, f"--ratio {option} --again"))
                    )
            table.rows.append((dataset, model, name, *cells))
    return table


_ORDINARY: dict[str, dict[str, Any]] = {
    "Ordinary augmentation (strong)": {"kind": "strong_augmentation"},
    "Synthetic": {"kind": "synthetic", "only": False},
}


def against_ordinary(results: Results) -> PaperTable:
    """Table 4 of 001."""
    places = {task: _places(results, task) for task in _TASKS}
    table = PaperTable(
        title="Paper 001, Table 4: against ordinary augmentation",
        note=_STARRED + "SGD is not part of the factory. AUC, and Dice in percent.",
        header=("train", "method", *(f"{task} {place}" for task in _TASKS for place in places[task])),
    )
    for dataset in dict.fromkeys(line.dataset for line in results.lines) or ["any"]:
        for name, want in _ORDINARY.items():
            cells = []
            for task, metric in _TASKS.items():
                for place in places[task]:
                    line = results.find(task=task, dataset=dataset, place=place, **want)
                    cells.append(told(line, metric) or table.not_run(results.downstream(task, "--ratio 1")))
            table.rows.append((dataset, name, *cells))
    return table


def _models(results: Results, task: str, published: Mapping[str, str]) -> dict[str, str]:
    """The paper's models by the name to show, and those that were run."""
    return dict(published) | {m: m for (m,) in results.groups(task, "model") if m not in published.values()}


def classifiers(results: Results) -> PaperTable:
    """Table 2 of 002."""
    models = _models(
        results,
        "classification",
        {"VGG16": "vgg16", "DenseNet121": "densenet121", "ViT": "vit_small_patch16_224"},
    )
    metrics = {"Precision": "macro_precision", "Recall": "macro_recall", "F1": "macro_f1"}
    table = PaperTable(
        title="Paper 002, Table 2: classifiers with and without synthetic images",
        note="Macro averages in percent; the paper's are micro averages, which of one label per image are all the accuracy.",
        header=("dataset", "trained on", *(f"{metric} {model}" for metric in metrics for model in models)),
    )
    recipes = results.groups("classification", "recipes") or [("any",)]
    for dataset in [d for (d,) in results.groups("classification", "dataset")] or ["any"]:
        rows: list[tuple[str, dict[str, Any]]] = [("Original set", {"kind": "real"})]
        rows += [(f"+ {', '.join(names) if isinstance(names, tuple) else names}", {"kind": "synthetic", "only": False, "recipes": names}) for (names,) in recipes]  # fmt: skip
        for name, want in rows:
            cells = []
            for metric in metrics.values():
                for model in models.values():
                    line = results.find(
                        task="classification", dataset=dataset, model=model, place="test", **want
                    )
                    command = results.downstream("classification", f"--model {model} --ratio 1 --again")
                    cells.append(told(line, metric) or table.not_run(command))
            table.rows.append((dataset, name, *cells))
    return table


def segmenters_by_scale(results: Results) -> PaperTable:
    """Table 3 of 002."""
    table = PaperTable(
        title="Paper 002, Table 3: segmentation at several sizes of the real set",
        note="IoU / Dice in percent. A size is a real table with so many training images (factory prepare --num-train N). "
        "Other generators of lesion-mask pairs are not part of the factory.",
        header=("recipe", "model", "real images", "original", "+ synthetic"),
    )
    keys = results.groups("segmentation", "recipes", "model", "num_train", "dataset")
    for recipes, model, count, dataset in keys:
        cells = []
        for want in ({"kind": "real"}, {"kind": "synthetic", "only": False}):
            line = results.find(task="segmentation", model=model, num_train=count, dataset=dataset, recipes=recipes, place="test", **want)  # fmt: skip
            both = [told(line, metric) for metric in ("iou", "dice")]
            cells.append(
                " / ".join(b for b in both if b)
                or table.not_run(results.downstream("segmentation", f"--model {model} --ratio 1"))
            )
        table.rows.append((", ".join(recipes), model, str(count), *cells))
    if len({count for _, _, count, _ in keys}) < 2:
        command = "factory prepare LAYOUT PATH --num-train N --out SMALL; " + results.downstream(
            "segmentation", "--ratio 1", real="SMALL"
        )
        cell = table.not_run(command)
        table.rows.append(("any", "any", "another size", cell, cell))
    return table


MIX: dict[str, dict[str, Any]] = {
    "0%": {"kind": "real"},
    "Ordinary augmentation": {"kind": "strong_augmentation"},
    **{f"{round(100 * r)}%": {"kind": "synthetic", "only": False, "ratio": r} for r in (0.25, 0.5, 1.0, 2.0)},
}
"""Columns of Tables 5 and 6 of 003: synthetic images per real one."""


def classification_mix(results: Results) -> PaperTable:
    """Table 5 of 003."""
    models = _models(results, "classification", {"ResNet50": "resnet50", "DenseNet121": "densenet121", "EfficientNet-B0": "efficientnet_b0", "MobileNetV2": "mobilenetv2_100"})  # fmt: skip
    table = PaperTable(
        title="Paper 003, Table 5: classification at several shares of synthetic images",
        note=_STARRED + "AUC / macro F1 in percent.",
        header=("dataset", "model", *MIX),
    )
    for dataset in [d for (d,) in results.groups("classification", "dataset")] or ["any"]:
        for name, model in models.items():
            cells = []
            for want in MIX.values():
                line = results.find(task="classification", dataset=dataset, model=model, place="test", **want)
                both = [told(line, metric) for metric in ("auc", "macro_f1")]
                command = results.downstream(
                    "classification", f"--model {model} --ratio 0.25 0.5 1 2 --again"
                )
                cells.append(" / ".join(b for b in both if b) or table.not_run(command))
            table.rows.append((dataset, name, *cells))
    return table


def segmentation_mix(results: Results) -> PaperTable:
    """Table 6 of 003."""
    models = _models(results, "segmentation", {"UNet": "unet", "UNet++": "unetplusplus", "ResUNet": "resunet", "Attention UNet": "attention_unet"})  # fmt: skip
    places = _places(results, "segmentation")
    table = PaperTable(
        title="Paper 003, Table 6: segmentation at several shares of synthetic images",
        note=_STARRED
        + "Dice in percent; "
        + " / ".join(places)
        + (
            ""
            if len(places) > 1
            else " (no external table was judged: --external TABLE adds the paper's second column)."
        ),
        header=("dataset", "model", *MIX),
    )
    for dataset in [d for (d,) in results.groups("segmentation", "dataset")] or ["any"]:
        for name, model in models.items():
            cells = []
            for want in MIX.values():
                found = [told(results.find(task="segmentation", dataset=dataset, model=model, place=p, **want), "dice") for p in places]  # fmt: skip
                command = results.downstream("segmentation", f"--model {model} --ratio 0.25 0.5 1 2 --again")
                cells.append(" / ".join(f or table.not_run(command) for f in found))
            table.rows.append((dataset, name, *cells))
    return table


SEGMENTERS = {"UPerNet": "upernet:resnet50", "DeepLabV3 Plus": "deeplabv3plus:resnet50",
              "Swin Transformer": "upernet:swin_tiny_patch4_window7_224", "nnU-Net": "dynunet"}  # fmt: skip
"""Models of 004 as `--model` names them."""


def _by_dataset(
    results: Results, table: PaperTable, rows: Mapping[str, tuple[dict[str, Any], str]]
) -> PaperTable:
    """Models × rows, one column of Dice per dataset."""
    datasets = [d for (d,) in results.groups("segmentation", "dataset")] or ["any"]
    for name, model in _models(results, "segmentation", SEGMENTERS).items():
        for label, (want, options) in rows.items():
            cells = []
            for dataset in datasets:
                line = results.find(task="segmentation", dataset=dataset, model=model, place="test", **want)
                command = results.downstream("segmentation", f"--model {model} {options}")
                cells.append(told(line, "dice") or table.not_run(command))
            table.rows.append((name, label, *cells))
    return table


def _datasets_header(results: Results) -> tuple[str, ...]:
    return tuple(d for (d,) in results.groups("segmentation", "dataset")) or ("any",)


def segmentation_models(results: Results) -> PaperTable:
    """Table 1 of 004."""
    amounts = sorted({line.ratio for line in results.lines if line.kind == "synthetic" and not line.only and line.ratio and line.task == "segmentation"})  # fmt: skip
    table = PaperTable(
        title="Paper 004, Table 1: segmentation with two amounts of synthetic pairs",
        note=_STARRED
        + "Dice in percent. The paper adds 1,500 and 2,750 pairs; here amounts are multiples of the real set.",
        header=("model", "trained on", *_datasets_header(results)),
    )
    rows: dict[str, tuple[dict[str, Any], str]] = {"original": ({"kind": "real"}, "--ratio 1 2 --again")}
    for amount in amounts or [1.0, 2.0]:
        want = {"kind": "synthetic", "only": False, "ratio": amount}
        rows[f"original + {amount:g}×"] = (want, "--ratio 1 2 --again")
    return _by_dataset(results, table, rows)


def _has_eroded_masks(recipes: tuple[str, ...]) -> bool:
    return any("eroded-mask" in n or (n.startswith("meddiff_ft") and "annotator" not in n) for n in recipes)


def post_processing(results: Results) -> PaperTable:
    """Table 3 of 004."""
    table = PaperTable(
        title="Paper 004, Table 3: filtering and eroded masks",
        note=_STARRED
        + "Dice in percent. Baseline: synthetic rows whatever the filters' verdict, at equal number. Corrode: "
        "rows whose masks were eroded (a recipe with the annotator eroded-mask).",
        header=("model", "synthetic rows", *_datasets_header(results)),
    )
    is_eroded = "--ratio 1 # a table made with annotator:eroded-mask"
    rows: dict[str, tuple[dict[str, Any], str]] = {
        "Baseline": ({"kind": "ungated"}, "--ratio 1"),
        "Baseline+filter": ({"kind": "synthetic", "only": False}, "--ratio 1"),
        "Baseline+corrode": ({"kind": "ungated", "recipes": _has_eroded_masks}, is_eroded),
    }
    return _by_dataset(results, table, rows)


def backgrounds(results: Results) -> PaperTable:
    """Table 4 of 004."""
    datasets = [d for (d,) in results.groups("segmentation", "dataset")] or ["any"]
    run = sorted({line.num_backgrounds for line in results.lines if line.num_backgrounds})
    numbers = list(dict.fromkeys([20, 30, 50, *run]))
    table = PaperTable(
        title="Paper 004, Table 4: number of backgrounds",
        note=_STARRED + "Dice in percent with synthetic rows on so many different real backgrounds.",
        header=("dataset", "model", *(str(n) for n in numbers)),
    )
    for dataset in datasets:
        for name, model in _models(results, "segmentation", SEGMENTERS).items():
            cells = []
            for count in numbers:
                line = results.find(task="segmentation", dataset=dataset, model=model, place="test", kind="synthetic", only=False, num_backgrounds=count)  # fmt: skip
                options = f"--model {model} --ratio 1 # a table on {count} backgrounds"
                cells.append(told(line, "dice") or table.not_run(results.downstream("segmentation", options)))
            table.rows.append((dataset, name, *cells))
    return table
