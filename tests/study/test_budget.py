"""A budget shrinks what takes time, says so, and leaves everything else as it is."""

from __future__ import annotations

import pytest

from vitedge.errors import UsageError
from vitedge.recipe import Recipe, TrainConfig, load_recipe, recipe_from_plain
from vitedge.study.budget import MIN_CALIBRATION, MIN_SAMPLES, Budget, build_seconds


def steps_of(recipe: Recipe) -> list[object]:
    return [config.steps or config.epochs for name, config in recipe.steps if name == "train"]  # type: ignore[attr-defined]


def test_a_tenth_of_the_steps_images_and_minutes() -> None:
    recipe = load_recipe("deit_tiny_prune_svd")
    smaller, label = Budget(0.1).apply(recipe)
    assert steps_of(recipe) == [400, 600] and steps_of(smaller) == [40, 60]
    assert label == "10 % of the steps"
    plain, other = recipe.to_plain(), smaller.to_plain()
    for one, two in zip(plain["steps"], other["steps"], strict=True):
        assert one == two or "train" in one
    guarded, _ = Budget(0.1).apply(load_recipe("deit_tiny_guarded_int8"))
    assert guarded.quantize.guard is not None and guarded.quantize.guard.minutes == pytest.approx(1.0)
    assert guarded.quantize.calibration.images == MIN_CALIBRATION
    half, _ = Budget(0.5).apply(load_recipe("deit_tiny_guarded_int8"))
    assert half.quantize.calibration.images == 128


def test_epochs_shrink_too_and_a_step_is_left() -> None:
    epochs, _ = Budget(0.25).apply(load_recipe("deit_tiny_32_distilled"))
    assert steps_of(epochs) == [7.0, 1.0]
    least, _ = Budget(0.001).apply(load_recipe("deit_tiny_224_nystrom24"))
    assert steps_of(least) == [1]


@pytest.mark.parametrize(
    ("name", "share", "every"),
    [
        ("deit_tiny_continued", 0.1, [80]),
        ("deit_tiny_continued", 0.5, [80]),
        ("deit_tiny_224_nystrom64", 0.5, [200]),
        ("deit_tiny_prune_svd", 0.3, [40, 60]),
    ],
)
def test_evaluations_shrink_with_the_steps(name: str, share: float, every: list[int]) -> None:
    """800 steps have ten of them: a tenth of these has one, a half five."""
    smaller, _ = Budget(share).apply(load_recipe(name))
    assert [config.evaluate_every for _, config in smaller.steps if isinstance(config, TrainConfig)] == every


def test_all_of_the_work_is_the_recipe_itself_without_a_label() -> None:
    recipe = load_recipe("deit_tiny_112_int8")
    assert Budget().apply(recipe) == (recipe, "")
    assert Budget().samples is None and Budget().label == ""
    assert Budget.parse(None) == Budget() == Budget.parse("1")


def test_few_steps_are_not_worth_compiling() -> None:
    def compiles(recipe: Recipe) -> list[bool]:
        return [config.compile for _, config in recipe.steps if isinstance(config, TrainConfig)]

    whole = load_recipe("deit_tiny_224_nystrom64")
    assert compiles(whole) == compiles(Budget(0.999).apply(whole)[0]) == [True]
    assert compiles(Budget(0.1).apply(whole)[0]) == [False]


def test_what_a_budget_makes_is_a_valid_recipe() -> None:
    smaller, _ = Budget(0.03).apply(load_recipe("deit_tiny_diffq"))
    assert recipe_from_plain(smaller.to_plain(), "smaller").to_plain() == smaller.to_plain()


@pytest.mark.parametrize(("share", "samples"), [(0.5, 5000), (0.01, MIN_SAMPLES)])
def test_test_images_shrink_to_what_still_says_something(share: float, samples: int) -> None:
    assert Budget(share).samples == samples


def test_a_label_tells_shares_apart_and_gives_them_back() -> None:
    labels = [Budget(share).label for share in (0.123, 0.1234, 0.12345)]
    assert labels == ["12.3 % of the steps", "12.34 % of the steps", "12.345 % of the steps"]


def test_a_time_is_read_in_minutes_or_hours() -> None:
    assert Budget.parse("90m") == Budget.parse("90min") == Budget.parse("1.5h") == Budget(minutes=90.0)


@pytest.mark.parametrize("text", ["0", "1.1", "-1", "nan", "10 %", "soon", "0m", "infh"])
def test_a_budget_that_is_none_is_one_line(text: str) -> None:
    with pytest.raises(UsageError, match="--budget: expected a share above 0"):
        Budget.parse(text)


def test_an_estimate_knows_what_makes_a_step_longer() -> None:
    plain = build_seconds(load_recipe("deit_tiny_continued"), "checkpoint")
    lsq = load_recipe("deit_tiny_lsq_w4a8")
    assert build_seconds(lsq, "checkpoint") > 1.5 * plain
    at_224 = build_seconds(load_recipe("deit_tiny_224_continued"), "checkpoint") / 500
    assert at_224 > 4 * plain / 800  # four times the patches, and attention grows with their square
