"""Sections of an evaluation's report, from the results that `factory evaluate` and `factory explore` wrote."""

from collections.abc import Mapping, Sequence
from typing import Any

from factory.report.figures import forest_plot, ratio_curve, reliability_diagram
from factory.report.page import Card, Cards, Facts, Grid, Plot, Section

IMAGES_HEADER = ("metric", "class", "value", "interval", "real vs real", "N real, synthetic", "features")


def number(value: float | None, digits: int = 4) -> str:
    """A number for a table: significant digits, "–" where there is none."""
    return "–" if value is None or value != value else f"{value:.{digits}g}"


def interval(low: float | None, high: float | None, digits: int = 4) -> str:
    """ "[low, high]", or "–"."""
    return "–" if low is None or high is None else f"[{number(low, digits)}, {number(high, digits)}]"


def _or_none(value: object) -> object:
    return "none" if value is None else value


def image_line(score: Mapping[str, Any]) -> tuple[str, ...]:
    """One line of the image table; a metric that was not computed says why."""
    value = number(score["value"]) if score["value"] is not None else f"not computed: {score['note']}"
    return (
        score["metric"],
        score["label"],
        value,
        interval(score["low"], score["high"]),
        number(score["floor"]),
        f"{score['num_real']}, {score['num_synthetic']}",
        score["features"],
    )


def images_sections(record: Mapping[str, Any]) -> list[Section]:
    """The table of `factory evaluate images`, how to read it, and what was compared."""
    scores: Sequence[Mapping[str, Any]] = record["scores"]
    passed = [s for s in scores if s["autoencoder"] is not None]
    sections: list[Section] = [
        Grid(
            title="Synthetic beside real images",
            note="Intervals: half subsamples without replacement; they hold the spread and not the bias at this number "
            "of images. Real vs real: the same number between two halves of the real images, at half their number; a "
            "value near it cannot be told from none. Diversity (ms_ssim, lpips): real vs real is that of the real "
            "images of the class. Smaller is better for kid, cmmd and fid; larger for precision, recall, density "
            "and coverage.",
            header=IMAGES_HEADER,
            rows=[image_line(score) for score in scores],
        )
    ]
    if passed:
        sections.append(
            Grid(
                title="What the autoencoder alone costs",
                note="Distance of the real images to the same images encoded and decoded: a latent generator with this "
                "autoencoder does not get below it in the long run.",
                header=("metric", "class", "real vs its reconstruction", "real vs synthetic", "features"),
                rows=[
                    (s["metric"], s["label"], number(s["autoencoder"]), number(s["value"]), s["features"])
                    for s in passed
                ],
            )
        )
    notes = dict.fromkeys((s["metric"], s["features"], s["note"]) for s in scores if s["note"])
    if notes:
        sections.append(Grid(title="Cautions", header=("metric", "features", "caution"), rows=list(notes)))
    real, synthetic = record["real"], record["synthetic"]
    sections.append(
        Facts(
            title="What was compared",
            facts={
                "real": f"{real['uri']} version {real['version']}, split {real['split']}, {real['rows']} images",
                "synthetic": f"{synthetic['uri']} version {synthetic['version']}, tag {_or_none(synthetic['tag'])}, "
                f"{synthetic['rows']} images, recipe {', '.join(synthetic['recipes'])}",
                **{f"preprocessing for {name}": how for name, how in _preprocessing(scores).items()},
                "code": record["code_version"],
            },
        )
    )
    return sections


def _preprocessing(scores: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {s["features"]: s["preprocessing"] for s in scores if s["value"] is not None}


# ------------------------------------------------------------------------------------------ downstream


def cautions(record: Mapping[str, Any]) -> list[str]:
    """What keeps a downstream result from being more than it is."""
    found = []
    tables = [part["comparison"] for part in record["evaluations"]]
    if any(table["is_pilot"] for table in tables):
        found.append("PILOT: one generator seed, so intervals hold no variation of the generator")
    if "unknown" in record["unit"]:
        found.append(f"{record['unit']}: images of one patient may be on both sides")
    for part in record["evaluations"]:
        opening = part["opening"]
        if opening["number"] > 1:
            found.append(
                f"opening {opening['number']} of the test split of {part['uri']}: numbers chosen by it are optimistic"
            )
    for source in record["synthetic"]:
        test = source["memorisation"]
        if test.get("verdict") != "not detected":
            told = test.get("verdict") or f"not tested: {test.get('not_done', 'unknown')}"
            found.append(f"memorisation by the generator of {source['uri']}: {told}")
    if (auc := record["shortcut_auc"]) is not None and auc >= 0.6:
        found.append(f"frame size, intensity and colour alone predict the class with AUC {auc:.2f}")
    if record["settings"]["scenario"] == "release":
        found.append("scenario release: the generator may have seen real rows that the real-only arm lacks")
    found += dict.fromkeys(note for table in tables for note in table["notes"])
    return found


def arm_line(arm: Mapping[str, Any], primary: str) -> tuple[str, ...]:
    """One line of the table of arms."""
    value, difference = arm["value"], arm["difference"]
    p = "–"
    if arm["adjusted_p"] is not None:
        p = f"{arm['adjusted_p']:.3f} ({'primary' if arm['name'] == primary else 'Holm'})"
    share = arm["oracle_fraction"]
    return (
        arm["name"],
        f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]",
        "reference"
        if difference is None
        else f"{difference['value']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]",
        p,
        "–" if share is None else ("none" if share <= 0 else f"{100 * share:.0f} %"),
    )


def downstream_sections(record: Mapping[str, Any]) -> list[Section]:
    """Power first, then the arms on each evaluation set, subgroups, calibration, cautions, and what was used."""
    sections: list[Section] = []
    for part in record["evaluations"]:
        sections += _evaluation_sections(record, part)
    warned = cautions(record)
    if warned:
        sections.append(Grid(title="Read with care", header=("caution",), rows=[(line,) for line in warned]))
    sections.append(_provenance(record))
    return sections


def _evaluation_sections(record: Mapping[str, Any], part: Mapping[str, Any]) -> list[Section]:
    table, name = part["comparison"], part["name"]
    metric, primary = table["metric"], table["primary"]
    arms = {arm["name"]: arm for arm in table["arms"]}
    main = arms[primary]
    effect, difference = table["minimum_detectable_effect"], main["difference"]
    is_clear = difference["low"] > 0 or difference["high"] < 0
    cards = [
        Card(
            label=f"smallest detectable change of {metric}",
            value=f"{effect:.3f}",
            about=f"5 %, power 80 %; {table['num_rows']} images in {table['num_groups']} groups, "
            f"{table['generator_seeds']} generator × {table['task_seeds']} task seeds",
            tone="warn" if effect > abs(difference["value"]) else "",
        ),
        Card(
            label=f"primary: {primary} against {table['reference']}",
            value=f"{difference['value']:+.3f}",
            about=f"[{difference['low']:+.3f}, {difference['high']:+.3f}], p {main['p_value']:.3f}",
            tone=("good" if difference["value"] > 0 else "bad") if is_clear else "",
        ),
    ]
    if table["is_pilot"]:
        cards.append(Card(label="generator seeds", value="PILOT", about="one generator only", tone="warn"))
    others = [arm for arm in table["arms"] if arm["difference"] is not None]
    sections: list[Section] = [
        Cards(title=f"{name}: what could be seen, and what was", cards=cards),
        Grid(
            title=f"{name}: arms",
            note=f"Mean {metric} over seeds with 95 % intervals (bootstraps over groups, and over generator seeds where "
            f"there are several); Δ is paired, against {table['reference']}. The primary comparison was declared before "
            "the rows were opened; the other p-values are corrected (Holm). Share: of the gain by as "
            "many real images.",
            header=("arm", metric, "Δ", "p", "of the oracle's gain"),
            rows=[arm_line(arm, primary) for arm in table["arms"]],
        ),
        Plot(
            title=f"{name}: differences",
            figure=forest_plot(
                [arm["name"] for arm in others],
                [arm["difference"]["value"] for arm in others],
                [(arm["difference"]["low"], arm["difference"]["high"]) for arm in others],
                xlabel=f"Δ {metric} against {table['reference']}",
                highlight=primary,
            ),
        ),
        _other_metrics(name, table),
    ]
    if any(arm["subgroups"] for arm in table["arms"]):
        sections.append(_subgroups(name, table))
    if part["reliability"]:
        drawn = list(
            dict.fromkeys(a for a in (table["reference"], primary, "oracle") if a in part["reliability"])
        )
        drawn += [a for a in part["reliability"] if a.startswith("oracle") and a not in drawn]
        curves = {a: [(b["confidence"], b["accuracy"]) for b in part["reliability"][a]] for a in drawn[:3]}
        note = "Bins of equal width over all seeds; ece_width and brier are in the table of other metrics."
        sections.append(Plot(title=f"{name}: calibration", note=note, figure=reliability_diagram(curves)))
    return sections


def _other_metrics(name: str, table: Mapping[str, Any]) -> Grid:
    kinds = list(dict.fromkeys(metric for arm in table["arms"] for metric in arm["other"]))
    return Grid(
        title=f"{name}: every metric",
        note="Means over seeds. A dash: not defined on these rows (no class of that kind, no healthy image).",
        header=("arm", *kinds),
        rows=[(arm["name"], *(number(arm["other"].get(kind), 3) for kind in kinds)) for arm in table["arms"]],
    )


def _subgroups(name: str, table: Mapping[str, Any]) -> Grid:
    arms = table["arms"]
    groups = {group["name"]: group["num_rows"] for arm in arms for group in arm["subgroups"]}
    found = {(arm["name"], g["name"]): g for arm in arms for g in arm["subgroups"]}
    primary, rows = table["primary"], []
    for group, count in groups.items():
        values = [number((found.get((arm["name"], group)) or {"value": None})["value"], 3) for arm in arms]
        difference = (found.get((primary, group)) or {}).get("difference")
        told = (
            "–"
            if difference is None
            else f"{difference['value']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"
        )
        rows.append((group, str(count), *values, told))
    return Grid(
        title=f"{name}: subgroups",
        note="Size: thirds of the real training lesions. Not corrected for being many: read as where to look next.",
        header=("subgroup", "images", *(arm["name"] for arm in arms), f"Δ of {primary}"),
        rows=rows,
    )


def _provenance(record: Mapping[str, Any]) -> Facts:
    real = record["real"]
    facts: dict[str, object] = {
        "real": f"{real['uri']} version {real['version']}: {real['train_rows']} train, {real['val_rows']} val, "
        f"{real['test_rows']} test, {real['reserve_rows']} reserve",
        "unit of the splits": record["unit"],
        "model": f"{record['model']}, loss {record['loss']}",
        "training": ", ".join(f"{k} {_or_none(v)}" for k, v in record["training"].items()),
        "filter": record["where"] or "none",
        "search": record["search"] or "none: the ratio was given",
        "shortcut AUC": number(record["shortcut_auc"], 2),
    }
    for source in record["synthetic"]:
        plans = ", ".join(f"{p['recipe']} seed {p['seed']} plan {p['plan_id'][:12]}" for p in source["plans"])
        test = source["memorisation"]
        facts[source["uri"]] = (
            f"version {source['version']}, tag {_or_none(source['tag'])}: {plans}; memorisation "
            f"{test.get('verdict') or 'not tested'}"
        )
    for part in record["evaluations"]:
        one = part["opening"]
        facts[f"opened {part['uri']}"] = (
            f"number {one['number']}, by {one['opened_by']}, {one['time']}: {one['reason']}"
        )
    facts["code"] = record["code_version"]
    return Facts(title="What was used", facts=facts)


# ------------------------------------------------------------------------------------------ ratio search


def ratio_sections(record: Mapping[str, Any]) -> list[Section]:
    """The curves of `factory explore ratio`: exploratory, from rows that no model of the test saw."""
    sections: list[Section] = []
    for curve in record["curves"]:
        name = curve["model"] + (f", where {curve['where']}" if curve["where"] else "")
        points = [*curve["points"], *curve["baselines"]]
        sections.append(
            Grid(
                title=f"Ratio search: {name}",
                note=f"Exploratory: mean {record['metric']} over folds of validation rows, 95 % intervals over folds. Smallest "
                f"detectable change {curve['minimum_detectable_effect']:.3f}. Chosen by the one-standard-error rule.",
                header=("arm", record["metric"], "interval", "Δ to real only", ""),
                rows=[
                    (
                        p["name"],
                        number(p["mean"], 3),
                        interval(p["low"], p["high"], 3),
                        number(p["difference"], 2),
                        "chosen"
                        if p["name"] == curve["chosen"]
                        else ("" if p in curve["points"] else "baseline"),
                    )
                    for p in points
                ],
            )
        )
        drawn = sorted(
            (p for p in curve["points"] if isinstance(p["ratio"], (int, float)) and p["mean"] is not None),
            key=lambda p: p["ratio"],
        )
        if len(drawn) > 1:
            chosen = next((p["ratio"] for p in drawn if p["name"] == curve["chosen"]), None)
            sections.append(
                Plot(
                    title=f"Ratio curve: {name}",
                    figure=ratio_curve(
                        [p["ratio"] for p in drawn],
                        [p["mean"] for p in drawn],
                        [(p["low"], p["high"]) for p in drawn],
                        ylabel=record["metric"],
                        chosen=chosen,
                    ),
                )
            )
    return sections


def sampler_sections(record: Mapping[str, Any]) -> list[Section]:
    """What the class-adaptive sampler did, by policy: scores on validation rows that picked the epoch."""
    rows = []
    for policy, found in record["summary"].items():
        pairs = found.get("difference_to_random")
        told = "–" if not pairs else f"{sum(pairs) / len(pairs):+.4f} ({len(pairs)} seed(s))"
        spread = "–" if found["score_std"] is None else number(found["score_std"], 3)
        rows.append((policy, str(found["num_seeds"]), number(found["score_mean"]), spread, told))
    return [
        Grid(
            title="Class-adaptive sampler",
            note="Scores of the validation fold that picked the epoch: too good for every policy alike, so only the "
            "difference to random actions at equal compute says whether learning helps. No test row was read.",
            header=("policy", "seeds", "score", "SD over seeds", "difference to random actions"),
            rows=rows,
        )
    ]
