"""The tasks of a study as trials of Optuna's storage: put in, claimed once, done, failed or handed back.

Of the trials with a task's key the last one counts, and one that failed without a reason was lost with its process: it is
put in again. Putting in is done under the folder's lock, so that two workers do not put a task in twice.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vitedge.errors import UsageError, VitedgeError
from vitedge.study.storage import LOST, STORAGE_LOCK, close_storage, hand_back, heartbeat, open_storage, reclaim, sign

if TYPE_CHECKING:
    import optuna

KEY, NAME, ERROR, NOTES = "key", "name", "error", "notes"
BEGUN_WITH = "begun with"  # of the study: what all its rows have in common


@dataclass(frozen=True)
class State:
    """How far a task is.

    Attributes:
        name: waiting | running | done | failed.
        trial: Number of its trial.
        reason: Why it failed.
        exit_code: Of that error.
        seconds: How long it took; None where it is not done.
        notes: What was kept with it.
        lost: How often a process died over it.
    """

    name: str
    trial: int
    reason: str = ""
    exit_code: int = 0
    seconds: float | None = None
    notes: Mapping[str, Any] | None = None
    lost: int = 0

    @property
    def ended(self) -> bool:
        """Done or failed."""
        return self.name in ("done", "failed")


class Queue:
    """A study's trials; to be used in a `with` block.

    Args:
        folder: The study's folder, which all workers share.
        url: `--storage`; None for a file in that folder.
        name: The study's name in the storage.

    Raises:
        UnavailableError: Optuna or the driver of the database is not installed.
        UsageError: The URL leads to no database.
        InputError: The file is no storage.
        OutputError: The folder cannot be written.
    """

    def __init__(self, folder: Path, url: str | None, name: str) -> None:
        self.storage = open_storage(folder, url)
        from filelock import FileLock

        self._lock = FileLock(folder / STORAGE_LOCK)
        import optuna

        self.study = optuna.create_study(
            storage=self.storage,
            study_name=name,
            sampler=optuna.samplers.RandomSampler(),
            pruner=optuna.pruners.NopPruner(),
            load_if_exists=True,
        )

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        close_storage(self.storage)

    def hold_to(self, name: str, identity: str, shown: str, fix: str) -> None:
        """Refuse something other than what the study was begun with: its table would mix both.

        Args:
            name: What of the study.
            identity: What must not change.
            shown: The same for people.
            fix: What to do besides choosing another folder.

        Raises:
            UsageError: It was begun with another.
        """
        with self._lock:
            kept = f"{BEGUN_WITH} {name}"
            begun = self.study.user_attrs.get(kept)
            if begun is None:
                self.study.set_user_attr(kept, [identity, shown])
            elif begun[0] != identity:
                raise UsageError(
                    name,
                    expected=f"what this study was begun with: {begun[1]}",
                    found=shown,
                    fix=f"choose another folder with -o (and another --storage), or {fix}",
                )

    def begun_with(self, name: str) -> str | None:
        """What `hold_to` holds to, for people; None where nothing does yet."""
        begun = self.study.user_attrs.get(f"{BEGUN_WITH} {name}")
        return None if begun is None else str(begun[1])

    def refresh(self, tasks: Mapping[str, str], again: bool = False, gone: Container[str] = ()) -> dict[str, State]:
        """Put back what was lost, put in what is missing, and say how far each task is.

        Args:
            tasks: Key to name.
            again: Whether those that failed are put in once more.
            gone: Keys of tasks that were done and of which nothing is left.
        """
        with self._lock:
            reclaim(self.study)
            states = self.states()
            for key, name in tasks.items():
                so_far = states[key].name if key in states else "missing"
                if so_far == "missing" or (again and so_far == "failed") or (key in gone and so_far == "done"):
                    self.study.enqueue_trial({}, user_attrs={KEY: key, NAME: name})
            return self.states()

    def states(self) -> dict[str, State]:
        """Key to state, of every task that was ever put in and was not lost since."""
        names = {"WAITING": "waiting", "RUNNING": "running", "COMPLETE": "done", "FAIL": "failed"}
        found: dict[str, State] = {}
        for trial in self.study.get_trials(deepcopy=False):
            kept, key = trial.user_attrs, trial.user_attrs.get(KEY)
            if key is None or (trial.state.name == "FAIL" and ERROR not in kept):
                continue
            error = json.loads(kept[ERROR]) if trial.state.name == "FAIL" else {}
            found[key] = State(
                names[trial.state.name],
                trial.number,
                error.get("message", ""),
                error.get("exit_code", 0),
                trial.value if trial.state.name == "COMPLETE" else None,
                json.loads(kept.get(NOTES, "{}")),
                kept.get(LOST, 0),
            )
        return found

    def claim(self, state: State) -> Claim | None:
        """Take a waiting task; None where another worker was faster."""
        import optuna

        trial_id = self.storage.get_trial_id_from_study_id_trial_number(self.study._study_id, state.trial)
        try:
            if not self.storage.set_trial_state_values(trial_id, optuna.trial.TrialState.RUNNING):
                return None
            trial = optuna.trial.Trial(self.study, trial_id)
            sign(trial)
        # Taken before, or, by a worker whose clock is hours ahead, held for one that nobody signed.
        except optuna.exceptions.UpdateFinishedTrialError:
            return None
        return Claim(self, trial, trial_id)


class Claim:
    """A task that this process runs.

    Args:
        queue: Where it came from.
        trial: Its trial.
        trial_id: The trial's number in the storage.
    """

    def __init__(self, queue: Queue, trial: optuna.trial.Trial, trial_id: int) -> None:
        self._queue, self._trial, self._id = queue, trial, trial_id

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """Let workers on other machines see that it is being worked on."""
        with heartbeat(self._queue.storage, self._id):
            yield

    def done(self, seconds: float, notes: Mapping[str, Any]) -> bool:
        """Finish it; False where it was taken for lost meanwhile, and is another worker's now."""
        return self._finish("COMPLETE", {NOTES: json.dumps(notes, default=str)}, [seconds])

    def failed(self, error: VitedgeError) -> bool:
        """Finish it with a reason, which stands in the table; returns as `done`."""
        return self._finish("FAIL", {ERROR: json.dumps({"message": str(error), "exit_code": error.exit_code})}, None)

    def hand_back(self) -> None:
        """Let it wait again, for this or another worker."""
        with self._queue._lock:
            hand_back(self._queue.study, self._trial.number)

    def _finish(self, state: str, kept: dict[str, str], values: list[float] | None) -> bool:
        import optuna

        try:
            for name, value in kept.items():
                self._trial.set_user_attr(name, value)
            self._queue.storage.set_trial_state_values(self._id, optuna.trial.TrialState[state], values)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False
        return True
