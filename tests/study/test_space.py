"""A space of settings: what a trial is given, what its file may say, and that the shipped searches are sound."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml
from hypothesis import strategies as st

from vitedge.errors import FileProblems, UsageError
from vitedge.schema import list_files, validate
from vitedge.study.definition import FOLDER, load_search
from vitedge.study.space import Dimension, Space, contains, options

RECIPE: dict[str, Any] = {
    "model": {"arch": "test_vit", "img_size": 16, "patch_size": 8, "weights": "none"},
    "steps": [{"prune": {"target": {"params": 0.7}}}, {"tome": {"r": 2, "blocks": [1]}}, {"train": {"steps": 2}}],
    "quantize": {"schemes": ["onnxruntime.int8_dynamic"]},
}
SPACE: dict[str, Any] = {
    "steps.tome.r": {"int": [1, 3]},
    "steps.tome": {"optional": True},
    "steps.prune.target.params": {"float": [0.5, 0.8, 0.1]},
    "steps.train.lr": {"float": [1e-5, 1e-3, "log"], "when": {"steps.train.steps": [4, 8]}},
    "steps.train.steps": {"choice": [2, 4, 8]},
}


def space_of(plain: dict[str, Any]) -> Space:
    return Space({path: validate(Dimension, one, "space.yaml") for path, one in plain.items()}, "space.yaml")


def write(folder: Path, **changes: Any) -> str:
    (folder / "small.yaml").write_text(yaml.safe_dump(RECIPE))
    content = {"recipe": str(folder / "small.yaml"), "space": SPACE, **changes}
    (folder / "a_search.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return str(folder / "a_search.yaml")


class FirstOf:
    """Stands for Optuna's trial where what is drawn does not matter: the first choice, the low end."""

    def __init__(self, **given: Any) -> None:
        self.given = {path.replace("__", "."): value for path, value in given.items()}
        self.asked: list[str] = []

    def _answer(self, name: str, default: Any) -> Any:
        self.asked.append(name)
        return self.given.get(name, default)

    def suggest_categorical(self, name: str, choices: list[str]) -> Any:
        return self._answer(name, choices[0])

    def suggest_int(self, name: str, low: int, high: int, step: int = 1) -> Any:
        return self._answer(name, low)

    def suggest_float(self, name: str, low: float, high: float, step: float | None = None, log: bool = False) -> Any:
        return self._answer(name, low)


def draw(space: Space, trial: Any) -> dict[str, Any]:
    return space.draw(trial)


def test_what_a_switched_off_technique_takes_is_not_asked_for() -> None:
    space, on, off = space_of(SPACE), FirstOf(), FirstOf(steps__tome="null")
    assert draw(space, on) == {"steps.tome": True, "steps.prune.target.params": 0.5, "steps.train.steps": 2, "steps.tome.r": 1}
    assert draw(space, off) == {"steps.tome": None, "steps.prune.target.params": 0.5, "steps.train.steps": 2}
    assert "steps.tome.r" not in off.asked and "steps.train.lr" not in on.asked
    assert draw(space, FirstOf(steps__train__steps="4"))["steps.train.lr"] == 1e-5


def test_an_optional_step_that_is_there_changes_nothing() -> None:
    space = space_of(SPACE)
    assert space.overrides({"steps.tome": True, "steps.tome.r": 3}) == {"steps.tome.r": 3}
    assert space.overrides({"steps.tome": None}) == {"steps.tome": None}


def test_settings_are_read_back_from_what_optuna_keeps() -> None:
    space = space_of({**SPACE, "model.options": {"choice": [{}, {"depth": 2}, None, 1, True, "1"]}})
    for options_of_model in ({}, {"depth": 2}, None, 1, True, "1"):
        settings = {"steps.tome": True, "steps.tome.r": 2, "steps.prune.target.params": 0.6, "model.options": options_of_model}
        kept = space.params(settings)
        assert isinstance(kept["model.options"], str) and isinstance(kept["steps.tome.r"], int)
        found = space.read(kept)
        assert found == settings and type(found["model.options"]) is type(options_of_model)
    assert space.read({**space.params({"steps.tome": None}), "steps.tome.r": 2, "unknown": 1}) == {"steps.tome": None}


def test_floats_are_drawn_to_six_digits() -> None:
    space = space_of({"steps.train.lr": {"float": [1e-5, 1e-3, "log"]}})
    assert draw(space, FirstOf(steps__train__lr=0.00012345678901)) == {"steps.train.lr": 0.000123457}
    assert space.read({"steps.train.lr": 0.7000000000000001}) == {"steps.train.lr": 0.7}


def test_exponents_that_yaml_reads_as_text_are_numbers() -> None:
    space = space_of({"steps.train.lr": yaml.safe_load("{float: [1e-5, 1e-3, log]}")})
    assert space.dimensions["steps.train.lr"].float == (1e-5, 1e-3, "log")


def test_combinations_are_counted_without_those_that_a_switch_takes_out() -> None:
    finite = {path: one for path, one in SPACE.items() if path != "steps.train.lr"}
    assert space_of(finite).count() == (3 + 1) * 4 * 3
    assert space_of(SPACE).count() == math.inf
    assert space_of({"model.img_size": {"choice": [16, 32]}}).count() == 2


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    """Small finite spaces in which later settings may hang on earlier ones."""
    space: dict[str, Any] = {}
    for index in range(draw(st.integers(1, 5))):
        above = draw(st.sampled_from(["", *space]))
        path = f"{above}.p{index}" if above and draw(st.booleans()) else f"p{index}"
        values = draw(st.lists(st.sampled_from([None, 1, 2, 3]), min_size=1, max_size=3, unique=True))
        space[path] = {"choice": values}
        if above and not path.startswith(f"{above}."):
            space[path]["when"] = {above: draw(st.sampled_from(space[above]["choice"]))}
    return space


@hypothesis.settings(deadline=None)
@hypothesis.given(trees())
def test_the_count_is_the_number_of_different_settings(plain: dict[str, Any]) -> None:
    space = space_of(plain)

    def enumerate_from(paths: list[str], settings: dict[str, Any]) -> list[dict[str, Any]]:
        if not paths:
            return [settings]
        path, *rest = paths
        if not space.is_there(path, settings):
            return enumerate_from(rest, settings)
        return [found for value in plain[path]["choice"] for found in enumerate_from(rest, {**settings, path: value})]

    everything = enumerate_from(list(space.dimensions), {})
    assert space.count() == len(everything)
    assert all(space.read(space.params(settings)) == settings for settings in everything)


def test_real_optuna_trials_draw_what_the_space_holds() -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = space_of(SPACE)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial(
        space.params({"steps.tome": None, "steps.prune.target.params": 0.8, "steps.train.steps": 8, "steps.train.lr": 1e-4})
    )
    seen = []
    for _ in range(20):
        trial = study.ask()
        settings = space.draw(trial)
        assert all(contains(space.dimensions[path], value) for path, value in settings.items())
        assert space.read(trial.params) == settings
        seen.append(settings)
        study.tell(trial, 0.0)
    assert seen[0] == {"steps.tome": None, "steps.prune.target.params": 0.8, "steps.train.steps": 8, "steps.train.lr": 1e-4}
    assert {3, 4, 5} >= {len(settings) for settings in seen} != {4}


def test_proposals_are_a_function_of_seed_and_number_and_avoid_what_misses() -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    from vitedge.study.sampler import make_sampler

    space = space_of({"x": {"int": [0, 50]}, "y": {"choice": ["a", "b"]}, "z": {"int": [0, 9], "when": {"y": "b"}}})

    def run(seed: int) -> list[dict[str, Any]]:
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=make_sampler(seed, 16))
        drawn = []
        for _ in range(30):
            trial = study.ask()
            settings = space.draw(trial)
            trial.set_constraint("low", settings["x"] / 50 - 0.5)
            if settings["x"] > 45:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            else:
                study.tell(trial, [-abs(settings["x"] - 10.0), float(settings["y"] == "b")])
            drawn.append(settings)
        return drawn

    first = run(0)
    assert run(0) == first and run(1) != first
    assert len({tuple(settings.items()) for settings in first[:4]}) > 1  # drawn at random, each with its own numbers
    late = [settings["x"] for settings in first[10:]]
    assert sum(x <= 25 for x in late) > len(late) / 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spaces": {}}, ["spaces", "did you mean 'space'"]),
        ({"space": {"steps.tome.r": {"itn": [1, 3]}}}, ["space.steps.tome.r.itn", "did you mean 'int'"]),
        ({"space": {}}, ["space"]),
        ({"space": {"steps.tome.r": {"int": [1, 3], "choice": [1]}}}, ["one of choice, int, float, optional"]),
        ({"space": {"steps.tome.r": {"int": [3, 1]}}}, ["low up to high"]),
        ({"space": {"steps.tome.r": {"int": [1, 4, 2]}}}, ["whole number of steps"]),
        ({"space": {"steps.tome.r": {"int": [1.5, 4]}}}, ["whole numbers"]),
        ({"space": {"steps.train.lr": {"float": [0.0, 1.0, "log"]}}}, ["with log a low above 0"]),
        ({"space": {"steps.train.lr": {"float": [1e-5, 1e-3, "lag"]}}}, ["numbers"]),
        ({"space": {"steps.train.steps": {"choice": [2, 2]}}}, ["each choice once"]),
        ({"space": {"steps.tomme.r": {"int": [1, 3]}}}, ["space.steps.tomme.r", "did you mean 'tome'"]),
        ({"space": {"steps.tome.rr": {"int": [1, 3]}}}, ["space.steps.tome.rr", "unknown key 'rr'"]),
        ({"space": {"steps.prune.target.params": {"float": [0.5, 1.5]}}}, ["space.steps.prune.target.params", "1.5"]),
        ({"space": {"data.validation": {"float": [0.1, 0.3]}}}, ["leaves the comparison fair"]),
        ({"space": {"steps.tome.r": {"int": [1, 3], "when": {"steps.prume": 1}}}}, ["when.steps.prume", "a path of the space"]),
        ({"space": {"steps.tome.r": {"int": [1, 3], "when": {"seed": 7}}, "seed": {"int": [0, 1]}}}, ["a value that seed may have"]),
        (
            {"space": {"seed": {"int": [0, 1], "when": {"steps.tome.r": 1}}, "steps.tome.r": {"int": [1, 3], "when": {"seed": 1}}}},
            ["do not wait for each other"],
        ),
        ({"first": [{"steps.tome.q": 1}]}, ["first.0.steps.tome.q", "did you mean 'steps.tome.r'"]),
        ({"first": [{"steps.tome.r": 9}]}, ["first.0.steps.tome.r", "a value of the space"]),
        ({"constraints": {"max_drop": 1}}, ["constraints.max_drop", "did you mean 'max_top1_drop'"]),
        ({"objectives": ["top1", "top1"]}, ["objectives", "each once"]),
        ({"objectives": ["speed"]}, ["objectives.0"]),
        ({"steps": [{"tomee": {}}]}, ["tomee", "did you mean 'tome'"]),
        ({"overrides": {"model.img_sise": 32}}, ["img_sise", "did you mean 'img_size'"]),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_path(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load_search(write(tmp_path, **changes))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert caught.value.exit_code == 2


def test_every_problem_of_a_file_is_said_at_once(tmp_path: Path) -> None:
    space = {"steps.tome.r": {"itn": [1, 3]}, "steps.train.steps": {"choice": []}}
    with pytest.raises(FileProblems) as caught:
        load_search(write(tmp_path, space=space, trials=0))
    assert len(str(caught.value).splitlines()) == len(caught.value.problems) >= 3


def test_trials_take_the_files_steps_and_the_baseline_keeps_the_recipes(tmp_path: Path) -> None:
    steps = [{"tome": {"r": 3, "blocks": [0]}}, {"train": {"steps": 5}}]
    space = {"steps.tome.r": {"int": [1, 3]}, "steps.train.lr": {"float": [1e-5, 1e-3, "log"]}}
    found = load_search(write(tmp_path, steps=steps, schemes=[], space=space, overrides={"data.validation": 0.3}))
    assert [name for name, _ in found.baseline.steps] == ["prune", "tome", "train"]
    assert [name for name, _ in found.base.steps] == ["tome", "train"]
    assert found.baseline.data == found.base.data and found.base.data.validation == 0.3
    assert len(found.baseline.quantize.schemes) == 1 and not found.base.quantize.schemes
    # A float without steps cannot be told from the recipe, and is left to the sampler.
    assert found.first() == [{"steps.tome.r": 3}]
    assert found.recipe_of({"steps.tome.r": 1}).to_plain()["steps"][0]["tome"]["r"] == 1


def test_hand_picked_settings_are_filled_up_with_the_recipes(tmp_path: Path) -> None:
    found = load_search(write(tmp_path, first=[{"steps.tome": None, "steps.train.steps": 8, "steps.train.lr": 1e-4}, {"steps.tome.r": 1}]))
    off, other = found.first()
    assert off == {"steps.tome": None, "steps.prune.target.params": 0.7, "steps.train.steps": 8, "steps.train.lr": 1e-4}
    assert other == {"steps.tome": True, "steps.tome.r": 1, "steps.prune.target.params": 0.7, "steps.train.steps": 2}
    assert [name for name, _ in found.recipe_of(off).steps] == ["prune", "train"]


@pytest.mark.parametrize("name", list_files(FOLDER))
def test_shipped_searches_are_sound(name: str) -> None:
    found = load_search(name)
    assert found.search.description and found.search.name == name
    dimensions = found.space.dimensions
    for settings in found.first():
        assert all(contains(dimensions[path], value) for path, value in settings.items())
        assert found.recipe_of(settings).name == found.base.name
    for path, dimension in dimensions.items():
        for value in (options(dimension) or [])[:20]:
            found.recipe_of(found.space.those_there({**found.space.needed(path), path: value}))
