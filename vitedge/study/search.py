"""A search: Optuna proposes settings, a trial builds and measures them, until the trials, the time or the settings are used up.

The storage is the queue and the memory. Several workers on one storage and one folder share the trials; a worker that is killed
loses nothing that is finished, and what it was at is begun again, where its training stopped, by whoever asks next. Proposing happens
one worker at a time, so that each sees what the others are at.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from statistics import mean
from typing import TYPE_CHECKING, Any

from vitedge.errors import InputError, OutputError, UnavailableError, UsageError, VitedgeError
from vitedge.study.definition import Definition
from vitedge.study.folder_lock import held
from vitedge.study.outcome import Outcome, finish, write_result
from vitedge.study.point import OBJECTIVES, Point, stands_for
from vitedge.study.records import CONDITIONS, DUPLICATE_OF, FAILURE, POINTS, SECONDS, SETTINGS, SKIPPED, Record, records_of
from vitedge.study.request import SearchRequest
from vitedge.study.sampler import make_sampler
from vitedge.study.space import Settings
from vitedge.study.storage import LOST, close_storage, hand_back, heartbeat, open_storage, reclaim, sign
from vitedge.study.trial import Measured, Reference, measure_baseline, measure_trial
from vitedge.study.workshop import Bar, Workshop, open_workshop, settings_digest, trial_root

if TYPE_CHECKING:
    import optuna

IDENTITY, ENQUEUED = "identity", "enqueued"
POLL_S = 2.0
MAX_LOST = 3  # processes that may die over one trial before it counts as failed
MAX_REPEATS = 25  # trials in a row that propose what was tried already
ASK_LOCK = ".ask.lock"
Bars = Callable[[], AbstractContextManager[Bar]]


@dataclass(frozen=True)
class News:
    """What a trial came to, told when it ends.

    Attributes:
        number: The trial's.
        done: Different settings tried so far, by all workers.
        limit: How many are to be tried.
        point: What it stands for; None where it failed.
        failure: Why it failed; empty where it did not.
        duplicate_of: The trial that had the same settings; None where there is none.
        seconds: It took.
        seconds_left: About, until this call ends; None where nothing says.
    """

    number: int
    done: int
    limit: int
    point: Point | None
    failure: str
    duplicate_of: int | None
    seconds: float
    seconds_left: float | None


def search(request: SearchRequest, say: Callable[[str], None], tell: Callable[[News], None], bars: Bars) -> Outcome:
    """Run a search, or go on with it.

    Args:
        request: What is asked.
        say: Told, in a line each, what the user should know while waiting.
        tell: Told of each trial that ends.
        bars: Gives progress bars by name, for as long as its block lasts.

    Raises:
        UsageError: The file, its data or its weights are wrong, or the folder is another search's.
        UnavailableError: Optuna, a device or a package that a trial needs is not there.
        VitedgeError: The baseline cannot be built and measured, or no trial came to anything.
    """
    definition = request.definition()
    folder = request.root(definition)
    shop = open_workshop(definition, folder, request.data, request.weights, say)
    storage = open_storage(folder, request.storage)
    try:
        identity = shop.identity()
        study = _open_study(storage, definition, identity)
        began = time.monotonic()
        with bars() as bar:
            reference = measure_baseline(shop, identity, bar)
        run = _Run(shop, reference, study, storage, tell, bars, began)
        ended = run.go()
        outcome = finish(shop, reference, lambda: records_of(study, definition.space), ended, bars)
    finally:
        close_storage(storage)
    failed = [record for record in outcome.records if record.failure]
    if failed and not any(record.points for record in outcome.records):
        raise InputError(
            f"search {definition.search.name}",
            expected="a trial that comes to something",
            found=f"{len(failed)} that failed, the first by: {failed[0].failure}",
            fix="change the space",
        )
    return outcome


def _open_study(storage: optuna.storages.RDBStorage, definition: Definition, identity: str) -> optuna.Study:
    """Optuna's study of this search, made where there is none.

    Raises:
        UsageError: The storage has a search of this name that is another one.
    """
    import optuna

    search = definition.search
    study = optuna.create_study(
        storage=storage,
        study_name=f"search {search.name}",
        directions=["maximize" if OBJECTIVES[name][1] else "minimize" for name in search.objectives],
        sampler=make_sampler(search.seed, search.trials),
        load_if_exists=True,
    )
    known = study.user_attrs.get(IDENTITY)
    if known is None:
        study.set_user_attr(IDENTITY, identity)
    elif known != identity:
        raise UsageError(
            f"search {search.name}",
            expected="the search that was begun here: the same recipe, space, measuring, limits, device, data, weights, host and engines",
            found="another one of that name",
            fix="choose another folder with -o (and another --storage)",
        )
    return study


@dataclass
class _Run:
    """One worker of a search."""

    shop: Workshop
    reference: Reference
    study: optuna.Study
    storage: optuna.storages.RDBStorage
    tell: Callable[[News], None]
    bars: Bars
    began: float
    ran: int = field(default=0, init=False)

    @property
    def limit(self) -> int:
        """Different settings to try."""
        search = self.shop.definition.search
        return int(min(search.trials, self.shop.definition.space.count()))

    def go(self) -> str:
        """Run trials until there is a reason to stop, which is returned."""
        waiting = False
        while True:
            asked = self._ask()
            if isinstance(asked, str):
                return asked
            if asked is None:
                if not waiting:
                    self.shop.say("nothing left to begin; waiting for the trials that other workers are at")
                waiting = True
                time.sleep(POLL_S)
                continue
            waiting = False
            trial, settings = asked
            self._run(trial, settings)
            write_result(self.shop, self.reference, self._records(), "not ended yet")

    def _records(self) -> list[Record]:
        return records_of(self.study, self.shop.definition.space)

    def _ask(self) -> tuple[optuna.Trial, Settings] | str | None:
        """A trial with its settings, or why there is no other; None where one that another worker is at may yet come back."""
        from filelock import FileLock

        definition = self.shop.definition
        with FileLock(self.shop.folder / ASK_LOCK):
            if not self.study.user_attrs.get(ENQUEUED):
                for settings in definition.first():
                    self.study.enqueue_trial(definition.space.params(settings))
                self.study.set_user_attr(ENQUEUED, True)
            for number in reclaim(self.study):
                self.shop.say(f"trial {number} was lost with its process; it is begun again")
            records = self._records()
            ended = self._why_ended(records)
            # Of a worker that died meanwhile nobody knows yet: who leaves now would leave its trial to nobody.
            if ended and self._is_full(records) and any(record.state == "RUNNING" for record in records):
                return None
            if ended:
                return ended
            with warnings.catch_warnings():
                # We send the heartbeat ourselves, for Study.optimize could not hold the lock while it asks.
                warnings.filterwarnings("ignore", message="Heartbeat of storage")
                trial = self.study.ask()
            sign(trial)
            return trial, definition.space.draw(trial)

    def _is_full(self, records: Sequence[Record]) -> bool:
        """Whether as many different settings as were asked for are tried or being tried."""
        return sum(record.counts for record in records) >= self.limit

    def _why_ended(self, records: Sequence[Record]) -> str:
        """Why no other trial is begun; empty where one is."""
        if self._is_full(records):
            return f"{self.limit} different settings were tried"
        finished = [record for record in records if record.ended]
        if len(finished) >= MAX_REPEATS and all(record.duplicate_of is not None for record in finished[-MAX_REPEATS:]):
            return f"{MAX_REPEATS} trials in a row proposed what was tried already"
        minutes = self.shop.definition.search.minutes
        if minutes is not None and self.ran and time.monotonic() - self.began + _typical_seconds(records) > 60 * minutes:
            return f"another trial would probably not end within {minutes:g} minutes"
        return ""

    def _run(self, trial: optuna.Trial, settings: Settings) -> None:
        """Run one trial to its end; interrupted, or without what every trial needs, it is handed back.

        Raises:
            UnavailableError: A package or device that it needs is not there.
            OutputError: Results cannot be written.
        """
        began = time.monotonic()
        failure = ""
        measured: Measured | None = None
        twin: Record | None = None
        try:
            with heartbeat(self.storage, trial._trial_id), self.bars() as bar:
                if trial.user_attrs.get(LOST, 0) >= MAX_LOST:
                    failure = f"{MAX_LOST} processes died over it, perhaps for want of memory"
                else:
                    measured, twin = self._evaluate(trial, settings, bar)
        except (KeyboardInterrupt, UnavailableError, OutputError):
            hand_back(self.study, trial.number)
            raise
        except VitedgeError as error:
            failure = str(error)
        except Exception as error:  # one trial's bad luck must not end the others; the reason stands in the table
            if os.environ.get("VITEDGE_DEBUG"):
                hand_back(self.study, trial.number)
                raise
            failure = f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        seconds = time.monotonic() - began
        if twin is not None:
            failure = twin.failure
        self.ran += 1
        points = twin.points if twin is not None else measured.points if measured is not None else ()
        self._finish(trial, points, failure, seconds, measured, twin)
        self._tell(trial.number, points, failure, seconds, twin)

    def _evaluate(self, trial: optuna.Trial, settings: Settings, bar: Bar) -> tuple[Measured | None, Record | None]:
        """What its settings come to, or the trial that tried them before.

        Raises:
            VitedgeError: They do not go together, or cannot be built and measured.
        """
        made = self.shop.definition.recipe_of(settings)
        digest = settings_digest(made)
        recipe = made.model_copy(update={"name": f"{made.name}_{digest[:8]}"})
        trial.set_user_attr(SETTINGS, digest)
        with held(trial_root(self.shop.folder, recipe), self.shop.say):
            # Looked for here: a worker that had the same settings has had this folder until now.
            twins = [record for record in self._records() if record.ended and record.digest == digest and record.duplicate_of is None]
            if twins:
                return None, twins[0]
            return measure_trial(self.shop, self.reference, recipe, trial.number, bar), None

    def _finish(
        self, trial: optuna.Trial, points: Sequence[Point], failure: str, seconds: float, measured: Measured | None, twin: Record | None
    ) -> None:
        """Tell the storage; a trial that was taken for lost meanwhile is another worker's now."""
        import optuna

        kept: dict[str, Any] = {SECONDS: round(seconds, 1)}
        if twin is not None:
            kept[DUPLICATE_OF] = twin.number
        elif measured is not None:
            kept |= {POINTS: [point.to_plain() for point in points], SKIPPED: list(measured.skipped), CONDITIONS: measured.conditions}
        if failure:
            kept[FAILURE] = failure
        try:
            for name, value in kept.items():
                trial.set_user_attr(name, value)
            if failure:
                # Pruned and not failed: what failed, Optuna's samplers forget, and propose again.
                self._constrain(trial, {"is_built": 1.0})
                self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                return
            point = stands_for(points)
            self._constrain(trial, point.misses)
            self.study.tell(trial, point.objectives(self.shop.definition.search.objectives))
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError) as error:
            if not self._is_finished(trial.number):
                raise
            self.shop.say(f"trial {trial.number} was taken for lost by another worker, which runs it again ({error})")

    def _constrain(self, trial: optuna.Trial, misses: dict[str, float]) -> None:
        known = trial.constraints
        for name, miss in misses.items():
            if name not in known:  # set before, by a process that died over it
                trial.set_constraint(name, miss)

    def _is_finished(self, number: int) -> bool:
        return any(trial.number == number and trial.state.is_finished() for trial in self.study.get_trials(deepcopy=False))

    def _tell(self, number: int, points: Sequence[Point], failure: str, seconds: float, twin: Record | None) -> None:
        records = self._records()
        done = sum(record.counts and record.ended for record in records)
        running = sum(record.state == "RUNNING" for record in records)
        left = (self.limit - done) * _typical_seconds(records) / (running + 1)
        minutes = self.shop.definition.search.minutes
        if minutes is not None:
            left = min(left, max(0.0, 60 * minutes - (time.monotonic() - self.began)))
        point = stands_for(points) if points else None
        self.tell(News(number, done, self.limit, point, failure, None if twin is None else twin.number, seconds, left))


def _typical_seconds(records: Sequence[Record]) -> float:
    """Mean of what trials took that did not fail and had no twin; 0 where there are none."""
    seconds = [record.seconds for record in records if record.points and record.seconds]
    return mean(seconds) if seconds else 0.0
