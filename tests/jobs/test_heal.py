"""factory heal: lesions painted over, everything else the patient's, and goes on where it stopped."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from factory.imaging import decode_png, decode_rows
from factory.recipes import RECIPES
from factory.sources.backgrounds import HealedLesions
from factory.storage import open_table, real_rows
from factory.training.masked_denoising import MaskedDenoising
from jobs.heal import Args, command, dilated, run
from schemas.identity import canonical

RECIPE = "meddiff_ft_tiny"
FAST = ("--sampling.num-inference-steps", "3")


def save_generator(folder: Path, region: str) -> str:
    """The shipped base as if trained with an objective of that region."""
    objectives = (MaskedDenoising(region=region),)  # type: ignore[arg-type]
    loaded = RECIPES[RECIPE]().generator.load()
    loaded.save(folder, {"name": RECIPE, "objectives": canonical(objectives)})
    return str(folder)


@pytest.fixture(scope="module")
def args(real_table: str, tmp_path_factory: pytest.TempPathFactory) -> Args:
    folder = tmp_path_factory.mktemp("heal")
    return Args(
        recipe=RECIPE,
        generator=save_generator(folder / "healer", "background"),
        real=real_table,
        out=str(folder / "healed.lance"),
        overrides=FAST,
        device="cpu",
    )


@pytest.fixture(scope="module")
def healed(args: Args) -> dict[str, dict]:
    summary = run(args)
    assert summary.before == 0 and summary.healed > 20 and not summary.failed
    return {row["image_id"]: row for row in open_table(args.out).read().to_pylist()}


def test_only_what_lies_under_the_mask_changes(args: Args, healed: dict[str, dict]) -> None:
    resolution = RECIPES[RECIPE]().generator.resolution
    rows = decode_rows(real_rows(args.real, splits=("train",)), resolution)
    lesions = [row for row in rows if row.mask is not None and row.mask.any()]
    assert set(healed) == {row.image_id for row in lesions}
    for row in lesions[:12]:
        assert row.mask is not None
        found = healed[row.image_id]
        image, painted = decode_png(found["image"]), decode_png(found["healed_mask"])
        assert (painted[row.mask > 0] == 1).all() and painted.sum() > (row.mask > 0).sum()
        away = dilated(painted, 2 / resolution) == 0  # beyond the seam, .01 of the side
        assert np.array_equal(image[away], row.image[away])
        assert np.abs(image.astype(int) - row.image)[row.mask > 0].mean() > 2
        assert found["group_id"] == row.group_id and found["licence"]


def test_healed_images_serve_as_backgrounds(args: Args, healed: dict[str, dict]) -> None:
    rows = decode_rows(real_rows(args.real, splits=("train",)), RECIPES[RECIPE]().generator.resolution)
    source = HealedLesions(table=args.out)
    assert len(source.fit(rows).backgrounds) == len(healed)
    assert list(source.weights()) == ["backgrounds"]


def test_running_again_heals_what_is_missing_and_the_same_pixels(args: Args, healed: dict[str, dict]) -> None:
    from factory.storage import write_table

    again = run(args)
    assert (again.before, again.healed) == (len(healed), 0)
    table = open_table(args.out)
    digest, kept = HealedLesions(table=args.out).weights(), table.read()
    write_table(args.out, kept.slice(5), table.schema, metadata=table.metadata, overwrite=True)
    assert run(dataclasses.replace(args, batch_size=3)).healed == 5
    found = {row["image_id"]: row for row in open_table(args.out).read().to_pylist()}
    assert set(found) == set(healed)
    for image_id, row in found.items():
        difference = decode_png(row["image"]).astype(int) - decode_png(healed[image_id]["image"])
        assert np.abs(difference).max() <= 2
    assert set(digest) == {"backgrounds"}


def test_other_settings_do_not_mix_into_a_table(args: Args, healed: dict[str, dict]) -> None:
    with pytest.raises(ValueError, match="another generator, recipe or settings"):
        run(dataclasses.replace(args, seed=1))
    with pytest.raises(ValueError, match="dilation"):
        run(dataclasses.replace(args, dilation=0.5))


def test_a_generator_of_lesions_is_refused(args: Args, tmp_path: Path) -> None:
    folder = save_generator(tmp_path / "lesions", "lesion")
    with pytest.raises(ValueError, match="region background"):
        run(dataclasses.replace(args, generator=folder))


def test_the_command_says_what_comes_next(
    args: Args,
    healed: dict[str, dict],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    argv = ["--recipe", RECIPE, "--generator", args.generator, "--real", args.real, "--out", args.out, *FAST]
    assert command([*argv, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert f"0 of {len(healed)} training images" in out and "--backgrounds.table" in out
