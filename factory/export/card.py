"""The dataset card of an export: README.md (Markdown with YAML front matter) and croissant.json.

Both are made from the rows that were written and from what the tables record; nothing in them is typed in by hand.
Names of tables appear without their folders.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factory.export.croissant import croissant
from factory.export.manifest import CHECKSUMS, SAMPLES
from factory.export.rows import Provenance
from factory.export.selection import NEAR_COPY, Selection
from factory.storage import Table
from factory.version import code_version

CARD = "README.md"
CROISSANT = "croissant.json"
NOT_CHECKED = "not checked"
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
LIMITATIONS = (
    "Synthetic medical images are made from a small real set: they repeat its biases, may show what no patient has, "
    "and may resemble training images. Use them to train and study models, never for diagnosis, and measure any gain "
    "on real test images that had no part in making them."
)


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card is made from.

    Attributes:
        name: of the dataset.
        format: of the files.
        selection: which rows left.
        seen: what was seen while they did.
        tag: of the synthetic table, where it was opened by one.
        command: how to make the export again.
        samples_sha256, samples_bytes: of samples.csv.
    """

    name: str
    format: str
    selection: Selection
    seen: Provenance
    tag: str | None
    command: str
    samples_sha256: str
    samples_bytes: int


def write_card(root: Path, facts: CardFacts) -> None:
    """README.md and croissant.json in `root`."""
    (root / CARD).write_text(card_text(facts), encoding="utf-8")
    text = json.dumps(_croissant(facts), indent=2, ensure_ascii=False)
    (root / CROISSANT).write_text(text + "\n", encoding="utf-8")


def card_text(facts: CardFacts) -> str:
    """The card as Markdown."""
    sections = (
        _front_matter,
        _counts,
        _left_out,
        _sources,
        _making,
        _curation,
        _copies,
        _reproduce,
        _files,
    )
    return "\n\n".join("\n".join(section(facts)) for section in sections) + "\n"


def curation_record(table: Table, tag: str | None) -> tuple[str, Mapping[str, Any]] | None:
    """Tag and record of the curation in force: that of `tag`, or the latest up to the table's version."""
    prefix = "curation."
    recorded = {key.removeprefix(prefix) for key in table.metadata if key.startswith(prefix)}
    versions = {name: number for name, number in table.tags().items() if name in recorded}
    usable = [name for name, number in versions.items() if number <= table.version]
    chosen = tag if tag in recorded else max(usable, key=lambda name: (versions[name], name), default=None)
    return None if chosen is None else (chosen, json.loads(table.metadata[prefix + chosen]))


def memorisation(facts: CardFacts) -> list[str]:
    """Lines on the search for copies of real images; `NOT_CHECKED` alone where there was none."""
    table = facts.selection.synthetic
    lines = []
    found = curation_record(table, facts.tag)
    if found is not None and found[1].get("copy_thresholds"):
        tag, record = found
        number = table.count(f"reject_reason = '{NEAR_COPY}'")
        kept = "are in this export" if facts.selection.choice.include_near_copies else "stayed behind"
        lines.append(
            f"Copy test of `{_cell(tag)}`: "
            + (
                f"{number} rows of the table are near copies of a real training image; they {kept}."
                if number
                else "copies of real training images not detected, at the power below."
            )
        )
        thresholds = ", ".join(f"{region} {value:.3f}" for region, value in record["copy_thresholds"].items())
        lines.append(f"- correlation of registered crops from which a row is a copy: {thresholds}")
        detected = (record.get("power") or {}).get("detected")
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in (detected or {}).items())
        lines.append(f"- share of planted copies found: {shares or 'not measured'}")
        alarm = record.get("false_alarm")
        lines.append(
            f"- validation images called copies: {'not measured' if alarm is None else f'{alarm:.1%}'}"
        )
    keys = [key for key in table.metadata if key == "memorisation" or key.startswith("memorisation.")]
    for key in sorted(keys):
        lines += [f"Recorded as `{_cell(key)}`:", "", "```json", _fenced(table.metadata[key]), "```"]
    return lines or [NOT_CHECKED]


# ------------------------------------------------------------------------------------------ sections


def _front_matter(facts: CardFacts) -> Iterator[str]:
    total = facts.selection.num_rows
    size = next((name for bound, name in _SIZES if total < bound), "n>1M")
    tasks = ["image-classification", "image-segmentation"]
    yield "---"
    yield f"pretty_name: {json.dumps(facts.name)}"
    yield "license: other"
    yield f"license_name: {json.dumps('; '.join(_licences(facts)), ensure_ascii=False)}"
    yield "tags: " + json.dumps(["synthetic", "medical", "image", facts.format])
    yield "task_categories: " + json.dumps(tasks)
    yield "size_categories: " + json.dumps([size])
    yield "---"
    yield ""
    yield f"# {facts.name}"
    yield ""
    yield _description(facts)
    yield ""
    yield LIMITATIONS


def _counts(facts: CardFacts) -> Iterator[str]:
    yield "## Rows"
    yield ""
    names = facts.selection.class_names
    yield from _table(("split", "origin", *names, "all"), _count_rows(facts))
    derived = sum(n for (_, origin, _), n in facts.seen.origins.items() if origin == "derived")
    yield ""
    yield f"Derived rows (synthetic, with pixels of a real image): {derived}."


def _count_rows(facts: CardFacts) -> Iterator[list[str]]:
    names = facts.selection.class_names
    for split in facts.selection.splits:
        for origin in ("real", "synthetic", "derived"):
            numbers = [facts.seen.origins[split, origin, name] for name in names]
            if sum(numbers):
                yield [split, origin, *map(str, numbers), str(sum(numbers))]


def _left_out(facts: CardFacts) -> Iterator[str]:
    yield "## Left out"
    yield ""
    names = facts.selection.class_names
    if not facts.selection.left_out:
        yield "Nothing: every row of the table is here."
    else:
        rows = (
            [reason, *(str(of.get(name, 0)) for name in names), str(sum(of.values()))]
            for reason, of in facts.selection.left_out.items()
        )
        yield from _table(("reason", *names, "all"), rows)
    for note in facts.selection.notes:
        yield ""
        yield f"Note: {_cell(note)}"


def _sources(facts: CardFacts) -> Iterator[str]:
    real, seen = facts.selection.real, facts.seen
    yield "## Real images"
    yield ""
    if seen.sources:
        rows = [[*source, str(number)] for source, number in sorted(seen.sources.items())]
        yield from _table(("dataset", "licence", "allowed use", "rows here"), rows)
    else:
        yield "No real row is in this export; the generator was trained on real rows."
        if real is None:
            yield "Their allowed use is not recorded in the synthetic table; see the table of real images."
        else:
            yield ""
            row = [real.metadata.get(key, "unknown") for key in ("dataset", "licence", "allowed_use")]
            yield from _table(("dataset", "licence", "allowed use"), [row])
    if seen.licences:
        yield ""
        yield "Licences that synthetic rows inherit from the real rows they were made with:"
        yield ""
        yield from _table(("licence", "rows"), [[name, str(n)] for name, n in sorted(seen.licences.items())])
    for citation in _citations(facts):
        yield ""
        yield f"Cite: {_cell(citation)}"


def _making(facts: CardFacts) -> Iterator[str]:
    found = curation_record(facts.selection.synthetic, facts.tag)
    yield "## How the synthetic rows were made"
    yield ""
    yield f"Table `{_cell(Path(facts.selection.synthetic.uri).name)}`, version {facts.selection.synthetic.version}."
    yield f"Curated tag: {'not curated' if found is None else f'`{_cell(found[0])}`'}."
    for plan_id, plan in sorted(facts.seen.plans.items()):
        yield ""
        yield f"- plan `{_cell(plan_id)}`: {facts.seen.plan_rows[plan_id]} rows"
        yield f"  - recipe `{_cell(plan['recipe'])}`, fingerprint `{_cell(plan['fingerprint'])}`, seed {plan['seed']}"
        yield f"  - made by version {_cell(plan['code_version'])}"
        for name, digest in sorted(plan["weights"].items()):
            yield f"  - weights {_cell(name)} `{_cell(digest)}`"


def _curation(facts: CardFacts) -> Iterator[str]:
    """How duplicates were searched, which classes fell short, and which thresholds were changed afterwards."""
    found = curation_record(facts.selection.synthetic, facts.tag)
    yield "## Curation"
    yield ""
    if found is None:
        yield "Not curated."
        return
    record = found[1]
    searched = record.get("deduplication")
    if searched is None:
        yield "- near-duplicates among synthetic rows: not searched, or not recorded"
    else:
        recall = searched.get("recall")
        if recall is not None:
            told = f"recall {recall:.3f}, of {searched['recall_pairs']} pairs that an exact search of "
            told += f"{searched['recall_rows']} sampled rows finds"
        elif "recall_rows" in searched:
            told = f"recall unknown: {searched['recall_rows']} sampled rows have no pair"
        else:
            told = "recall not measured: exact" if searched["method"] == "exact" else "recall not measured"
        yield f"- near-duplicates among synthetic rows: {_cell(searched['method'])} search, {told}"
    for name, value in sorted((record.get("duplicate_limits") or {}).items()):
        yield f"- duplicates of class {_cell(name)}: cosine of {value:.4f} or more"
    for floor in record.get("floors") or ():
        kept = f", {floor['kept']} duplicates kept for it" if floor["kept"] else ""
        yield (
            f"- class {_cell(floor['label'])} fell below the floor of {floor['min_share']:.0%} accepted rows: "
            f"{floor['accepted']} of {floor['rows']}{kept}; {'met' if floor['met'] else 'not met'}"
        )
    rejudged = record.get("rejudged")
    if rejudged is not None:
        thresholds = ", ".join(f"`{_cell(text)}`" for text in rejudged["thresholds"]) or "the recipe's own"
        yield f"- judged again from stored scores with thresholds {thresholds}: {rejudged['changed']} verdicts changed"


def _copies(facts: CardFacts) -> Iterator[str]:
    yield "## Copies of real images"
    yield ""
    yield from memorisation(facts)


def _reproduce(facts: CardFacts) -> Iterator[str]:
    table = Path(facts.selection.synthetic.uri).name
    yield "## Making it again"
    yield ""
    yield "```sh"
    if facts.command:
        yield _fenced(facts.command)
    yield f"factory reproduce {_fenced(table)} REQUEST_ID   # any synthetic id of {SAMPLES}"
    yield "```"
    yield ""
    yield f"Exported by version {code_version()}. The same tables at the same versions give the same rows."


def _files(facts: CardFacts) -> Iterator[str]:
    yield "## Files"
    yield ""
    yield f"Format: {facts.format}. `{SAMPLES}` has one line per image; `manifest.json` every row and file with its"
    yield f"SHA-256; `sha256sum -c {CHECKSUMS}` checks the folder. `{CROISSANT}` describes it for machines."


# ------------------------------------------------------------------------------------------ details


def _croissant(facts: CardFacts) -> Mapping[str, Any]:
    return croissant(
        name=facts.name,
        description=f"{_description(facts)} Copies of real images: {' '.join(memorisation(facts))}",
        format=facts.format,
        licences=_licences(facts),
        citations=_citations(facts) or [f"{facts.name}, made by synthetic-data-factory {code_version()}"],
        limitations=LIMITATIONS,
        date=_date(facts.selection.synthetic),
        samples_sha256=facts.samples_sha256,
        samples_bytes=facts.samples_bytes,
    )


def _description(facts: CardFacts) -> str:
    counts = {
        origin: sum(n for (_, kind, _), n in facts.seen.origins.items() if kind == origin)
        for origin in ("real", "synthetic", "derived")
    }
    parts = ", ".join(f"{number} {origin}" for origin, number in counts.items() if number)
    classes = ", ".join(_cell(name) for name in facts.selection.class_names)
    return f"{facts.selection.num_rows} medical images ({parts}) of the classes {classes}."


def _date(table: Table) -> str:
    """Day of the table's version, so that the same export has the same card."""
    return next(time.date().isoformat() for number, time in table.versions() if number == table.version)


def _licences(facts: CardFacts) -> list[str]:
    found = {licence for _, licence, _ in facts.seen.sources} | set(facts.seen.licences)
    return sorted(found - {""}) or ["unknown"]


def _citations(facts: CardFacts) -> list[str]:
    real = facts.selection.real
    text = "" if real is None else real.metadata.get("citation", "")
    return [text] if text else []


def _table(head: Sequence[str], rows: Iterator[list[str]] | Sequence[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(map(_cell, head)) + " |"
    yield "|" + " --- |" * len(head)
    for row in rows:
        yield "| " + " | ".join(map(_cell, row)) + " |"


def _cell(text: object) -> str:
    """Text that stays inside its cell, its line and its back-quotes, and is no HTML."""
    flat = " ".join(str(text).split())
    for mark, shown in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "'")):
        flat = flat.replace(mark, shown)
    return flat


def _fenced(text: str) -> str:
    """Text that cannot end the code block it stands in."""
    return text.replace("```", "'''")
