"""Recipes on the command line: names, overrides, components by choice, and what a mistake is answered with."""

import dataclasses
from pathlib import Path

import pytest

from factory.recipes import RECIPES
from factory.sources.masks import RealMasks
from jobs.recipe_args import get_recipe, parse_args, parse_recipe
from jobs.recipes import command
from jobs.synthesis_plan import Args


@pytest.mark.parametrize("name", RECIPES)
def test_built_in_recipes_carry_their_own_name(name: str) -> None:
    assert get_recipe(name).name == name


def test_one_field_is_overridden_and_changes_the_fingerprint() -> None:
    changed = parse_recipe("tiny", ["--sampling.num-inference-steps", "7"])
    assert changed.sampling.num_inference_steps == 7
    assert dataclasses.replace(changed, sampling=get_recipe("tiny").sampling) == get_recipe("tiny")
    assert changed.fingerprint != get_recipe("tiny").fingerprint


def test_training_and_filters_are_not_part_of_the_fingerprint() -> None:
    changed = parse_recipe("tiny", ["--training.max-steps", "9"])
    assert changed.training.max_steps == 9
    assert changed.fingerprint == get_recipe("tiny").fingerprint
    assert dataclasses.replace(changed, filters=()).fingerprint == changed.fingerprint


def test_another_component_of_the_same_kind_is_chosen() -> None:
    assert parse_recipe("tiny", ["masks:real-masks"]).masks == RealMasks()


def test_choices_and_options_may_stand_in_any_order() -> None:
    options = ["--masks.shift", "0.1", "--sampling.num-inference-steps", "7"]
    one = parse_recipe("tiny", ["masks:real-masks", *options])
    assert one == parse_recipe("tiny", [*options, "masks:real-masks"])
    assert one.masks == RealMasks(shift=0.1) and one.sampling.num_inference_steps == 7


def test_local_paths_hold_in_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    changed = parse_recipe("scmg", ["--masks.checkpoint", "runs", "--generator.vae", "absent"])
    assert changed.masks.checkpoint == str(tmp_path / "runs")  # type: ignore[union-attr]
    assert changed.generator.vae == "absent" and changed.generator.base.count("/") == 1
    assert changed.fingerprint == get_recipe("scmg").fingerprint, "where something lies is not identity"


def test_choices_reach_into_tuples_and_nested_fields() -> None:
    changed = parse_recipe("tiny", ["generator.conditioning:text-only", "filters.3:blank-image"])
    assert type(changed.generator.conditioning).__name__ == "TextOnly"
    assert [type(item).__name__ for item in changed.filters][3] == "BlankImage"
    assert parse_recipe("didgen", ["annotator:none"]).annotator is None
    same = parse_recipe("didgen", ["masks:real-masks"])
    assert same == get_recipe("didgen"), "a component of that kind keeps its settings"


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("masks:real-mask", "did you mean 'real-masks'"),
        ("generator.conditionin:text-only", "no field 'conditionin'"),
        ("filters.9:blank-image", "want a number of 0 … 3"),
        ("filters.first:blank-image", "want a number"),
    ],
)
def test_a_wrong_choice_names_what_there_is(choice: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_recipe("tiny", [choice])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--sampling.num-inference-stesp", "7"], "--sampling.num-inference-steps"),
        (["--sampling.num-inference-steps", "many"], "many"),
    ],
)
def test_a_wrong_override_names_the_field(
    overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_recipe("tiny", overrides)
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.out + captured.err


def test_a_mistyped_job_option_suggests_the_right_one() -> None:
    needed = ["--recipe", "tiny", "--generator", "g", "--real", "r", "--out", "o"]
    with pytest.raises(ValueError, match="--num-requests"):
        parse_args(Args, [*needed, "--num-request", "3"], "factory synthesize")
    args = parse_args(
        Args, [*needed, "--num-requests", "3", "--sampling.guidance-scale", "2"], "factory synthesize"
    )
    assert args.num_requests == 3 and args.overrides == ("--sampling.guidance-scale", "2")


def test_recipes_of_ones_own(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_recipes.py").write_text(
        "import dataclasses\nfrom factory.recipes import RECIPES\n"
        "def mine():\n    return dataclasses.replace(RECIPES['tiny'](), name='mine')\n"
        "def wrong():\n    return 3\n"
    )
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "away.py").write_text("raise SystemExit('code from outside the tree ran')")
    (tmp_path / "away.py").symlink_to(elsewhere / "away.py")
    (tmp_path / "json.py").write_text("def loads():\n    return 3\n")
    monkeypatch.chdir(tmp_path)
    assert get_recipe("my_recipes:mine").name == "mine"
    for name, message in [
        ("my_recipes:wrong", "returned a int"),
        ("my_recipes:absent", "no function 'absent'"),
        ("no_such_module:mine", "no_such_module"),
        ("os:getcwd", "no module 'os' below the working directory"),
        ("json:loads", "Python already has a module 'json'"),
        ("away:mine", "outside the working directory"),
        ("../x:mine", "no module"),
        (".my_recipes:mine", "no module"),
        ("tinyy", "did you mean 'tiny'"),
    ]:
        with pytest.raises(ValueError, match=message):
            get_recipe(name)


def test_listing_and_showing(capsys: pytest.CaptureFixture[str]) -> None:
    assert command([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES)
    assert command(["show", "tiny", "--training.max-steps", "9"]) == 0
    shown = capsys.readouterr().out
    assert "max_steps = 9" in shown and "fingerprint" in shown
    with pytest.raises(ValueError, match="show NAME"):
        command(["hide", "tiny"])
