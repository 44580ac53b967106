"""One worker of a study: takes task after task until none is left that can be done here.

Several workers, on this machine or others, run the same command on the same folder or storage; each task is claimed once,
and a worker with nothing to take waits for those that others run. A task that fails keeps its reason and stops nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from vitedge import data as datasets
from vitedge.device import Device
from vitedge.errors import OutputError, UsageError, VitedgeError, WorkerError
from vitedge.pipeline import Bar
from vitedge.study.available import require_one
from vitedge.study.estimate import estimate_measuring, estimate_task
from vitedge.study.measure import Built, measure_device, measure_key, measurements_file, to_measure
from vitedge.study.origins import find_origins
from vitedge.study.outcome import RESULT as SEARCHED
from vitedge.study.plan import BUILDS, Plan, Task, first_of
from vitedge.study.queue import Claim, Queue, State
from vitedge.study.results import RESULTS, collect, write_results
from vitedge.study.rows import build_task, is_built
from vitedge.study.storage import STORAGE_FILE
from vitedge.study.workshop import TRIALS

Bars = Callable[[], AbstractContextManager[Bar]]
POLL_S = 1.0
MOST_LOST = 10  # processes that died over a task before it is taken to be what kills them


def run_study(
    plan: Plan, url: str | None, say: Callable[[str], None], bars: Bars, retry_failed: bool = False
) -> tuple[dict[str, Any], Path, list[State]]:
    """Work on a study until nothing is left for this host; `results.json` is up to date after every task.

    Args:
        plan: The study.
        url: `--storage`; None for a file in the study's folder.
        say: Told, in a line each, what ended, how much is left and about how long.
        bars: Opens progress bars for one task.
        retry_failed: Whether rows that failed before are tried again.

    Returns:
        What the file of results has, its path, and the states of what failed.

    Raises:
        UnavailableError: None of the devices is here, or Optuna is not installed.
        UsageError: The study was begun with another budget, images or weights, or the data that all rows share is not there.
        OutputError: The study's folder cannot be written.
        KeyboardInterrupt: Told to end; the task at hand was handed back.
    """
    unavailable = require_one(plan)
    _check_folder(plan.folder)
    with Queue(plan.folder, url, plan.spec.name) as queue:
        data = find_data(plan)
        _hold(plan, queue, data)
        worker = _Worker(plan, queue, unavailable, data, say, bars)
        worker.put_in(retry_failed)
        worker.work()
        states = queue.states()
        content = collect(plan, states, unavailable)
        path = write_results(plan, content)
    wanted = {**worker.names, **{key: "" for _, key in worker.measuring(states)}}
    return content, path, [states[key] for key in wanted if key in states and states[key].name == "failed"]


def _check_folder(folder: Path) -> None:
    """Refuse a folder of something else: its files could be written over."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.is_dir() else set()
    if (names and not names & {BUILDS, STORAGE_FILE, RESULTS}) or names & {TRIALS, SEARCHED}:
        raise UsageError(
            str(folder), expected="an empty folder or one of a study", found="other files", fix="choose another folder with -o"
        )


def _hold(plan: Plan, queue: Queue, data: str | None) -> None:
    """Refuse to go on with a study that was begun with another budget, device, images or weights, or with some that are not here.

    A host without images or weights would fail every row that is left, for all the others. Devices may be added and left out, but for the
    one whose builds have the rows' own folders: another's would be built over them.
    """
    label = plan.budget.label
    queue.hold_to("--budget", label, f"--budget {plan.budget.share:g}" if label else "all of the work", "give the same budget")
    first = first_of(plan.devices)
    queue.hold_to("--device", first, first, "give that device too, before others of its kind")
    states = queue.states()
    unfinished = any(task.key not in states or not states[task.key].ended for task in plan.tasks)
    for origin in find_origins(plan, data):
        if origin.digest:
            queue.hold_to(origin.name, origin.digest, origin.shown, "give the same")
        elif unfinished and (begun := queue.begun_with(origin.name)) is not None:
            fix = "bring them here, and give --data or --weights, or set VITEDGE_DATA or VITEDGE_WEIGHTS"
            raise UsageError(origin.name, expected=f"what this study was begun with: {begun}", found="none on this host", fix=fix)


def find_data(plan: Plan) -> str | None:
    """`--data` as the one data set it means: a folder of data sets is looked into once, by the name that all rows share.

    Raises:
        UsageError: The folder does not hold it.
    """
    names = {task.recipe.data.name for task in plan.tasks}
    if plan.data is None or len(names) != 1:
        return plan.data
    return str(datasets.find(names.pop(), plan.data).path)


class _Worker:
    """The loop, and what it says."""

    def __init__(
        self, plan: Plan, queue: Queue, unavailable: Mapping[str, str], data: str | None, say: Callable[[str], None], bars: Bars
    ) -> None:
        self.plan, self.queue, self.unavailable, self.data, self.say, self.bars = plan, queue, unavailable, data, say, bars
        self.names = {task.key: task.name for task in plan.tasks}
        self.pace: list[tuple[float, float]] = []  # seconds estimated and taken, of what this worker did
        self.estimates = {task.key: estimate_task(plan, task).seconds for task in plan.tasks}
        self.told_of_waiting = False
        self.looked_for: set[str] = set()

    def put_in(self, again: bool) -> None:
        """Every task that is not in yet, what failed where it is to be tried again, and what was done and whose folder has none of it."""
        known = self.queue.states()
        done = [task for task in self.plan.tasks if task.key in known and known[task.key].name == "done"]
        states = self.queue.refresh(self.names, again, {task.key for task in done if not is_built(self.plan, task)})
        if again:
            self.queue.refresh({key: f"measuring {device.name}" for (_, device), key in self.measuring(states)}, again)

    def work(self) -> None:
        """Until nothing is left to be done here, and nothing is under way elsewhere."""
        while True:
            states = self.queue.refresh(self.names)
            measuring = self.measuring(states)
            if measuring:
                names = {key: f"measuring {device.name}" for (_, device), key in measuring}
                states = self.queue.refresh(names, gone=self.lost(measuring))
            if self._take_one(states, measuring):
                self.told_of_waiting = False
                continue
            under_way = [key for key in (*self.names, *(key for _, key in measuring)) if key in states and states[key].name == "running"]
            if not under_way:
                return
            if not self.told_of_waiting:
                self.say(f"nothing to take up; waiting for {len(under_way)} under way in other processes")
                self.told_of_waiting = True
            time.sleep(POLL_S)

    def lost(self, measuring: list[tuple[tuple[str, Device], str]]) -> set[str]:
        """Of these keys those without figures in the folder; each is looked for once, lest workers without a common folder never end."""
        new = [(device, key) for (_, device), key in measuring if key not in self.looked_for]
        self.looked_for |= {key for _, key in new}
        return {key for device, key in new if not measurements_file(self.plan, device, key).is_file()}

    def measuring(self, states: Mapping[str, State]) -> list[tuple[tuple[str, Device], str]]:
        """The devices here whose rows are all built or failed, each with the key of measuring what was built."""
        found = []
        for asked, device in self.plan.devices:
            rows = self.plan.rows_of(device.name)
            if device.name in self.unavailable or not all(task.key in states and states[task.key].ended for task in rows):
                continue
            built = self._built(device, states)
            if built:
                found.append(((asked, device), measure_key(self.plan, device, built)))
        return found

    def _built(self, device: Device, states: Mapping[str, State]) -> list[Built]:
        return to_measure(self.plan, device, {key for key, state in states.items() if state.name == "done"})

    def _take_one(self, states: Mapping[str, State], measuring: list[tuple[tuple[str, Device], str]]) -> bool:
        """Claim and run the first task that can be run, or see that another worker just took it; False where there is none."""
        ready = [task for task in self.plan.tasks if self._is_ready(task, states)]
        if ready:
            # What killed a process comes last, so that it cannot keep the others from being done.
            task = min(ready, key=lambda task: states[task.key].lost)
            claim = self.queue.claim(states[task.key])
            if claim is not None:
                self._run(claim, task.key, task.name, states, partial(self._build, task, states))
            return True
        for (asked, device), key in measuring:
            if states[key].name != "waiting":
                continue
            claim = self.queue.claim(states[key])
            if claim is not None:
                built = self._built(device, states)
                job = partial(measure_device, self.plan, asked, device, built, self.data, self.say)
                self._run(claim, key, f"measuring {len(built)} rows on {device.name}", states, job)
            return True
        return False

    def _is_ready(self, task: Task, states: Mapping[str, State]) -> bool:
        """Waiting, for a device that is here, and what it stands on has ended."""
        if states[task.key].name != "waiting" or task.device in self.unavailable:
            return False
        return all(states[key].ended for key in (*task.needs, *([task.after] if task.after else [])))

    def _build(self, task: Task, states: Mapping[str, State], bar: Bar) -> dict[str, Any]:
        for key in task.needs:
            if states[key].name == "failed":
                raise VitedgeError(
                    task.label,
                    expected=f"{self.names[key]} to be built",
                    found=states[key].reason,
                    fix="mend that, then use --retry-failed",
                )
        return build_task(self.plan, task, self.data, self.say, bar)

    def _run(self, claim: Claim, key: str, name: str, states: Mapping[str, State], job: Callable[[Bar], dict[str, Any]]) -> None:
        """Run a claimed task; whatever goes wrong is the task's, and the next one is taken."""
        self.say(f"{name}: begun")
        began = time.monotonic()
        kept: dict[str, Any] = {}
        failure: VitedgeError | None = None
        try:
            with claim.alive(), self.bars() as bar:
                if states[key].lost >= MOST_LOST:
                    raise WorkerError(
                        name,
                        expected="a process that lives through it",
                        found=f"{states[key].lost} that were killed",
                        fix="see whether memory ran out, then use --retry-failed",
                    )
                kept = job(bar)
        except OutputError:  # a full disk is this host's, and would fail every row that is left
            claim.hand_back()
            raise
        except VitedgeError as error:
            failure = error
        except Exception as error:
            if os.environ.get("VITEDGE_DEBUG"):
                claim.hand_back()
                raise
            failure = _unexpected(name, error)
        except BaseException:
            claim.hand_back()
            raise
        seconds = time.monotonic() - began
        still_ours = claim.failed(failure) if failure else claim.done(seconds, kept)
        self.pace.append((self.estimates.get(key, seconds), seconds))
        self._tell(name, seconds, failure, still_ours)

    def _tell(self, name: str, seconds: float, failure: VitedgeError | None, still_ours: bool) -> None:
        """One line: what ended, and what is left; and the results as they are now."""
        states = self.queue.states()
        own = [states[key] for key in self.names if key in states]
        counts = {kind: sum(state.name == kind for state in own) for kind in ("done", "failed", "running", "waiting")}
        left = f"{counts['done']} done, {counts['failed']} failed, {counts['running'] + counts['waiting']} left of {len(self.names)}"
        ended = f"failed: {failure}" if failure else f"done in {_time(seconds)}"
        if not still_ours:
            ended = "was taken for lost meanwhile; another process has it now"
        self.say(f"{name}: {ended}. {left}, about {_time(self._seconds_left(states, counts['running'] + 1))} to go")
        write_results(self.plan, collect(self.plan, states, self.unavailable))

    def _seconds_left(self, states: Mapping[str, State], workers: int) -> float:
        """The estimates of what is left, at the pace so far, shared among the workers at work."""
        estimated, taken = (sum(column) for column in zip(*self.pace, strict=True))
        pace = min(20.0, max(0.05, taken / estimated)) if estimated else 1.0
        unfinished = [task for task in self.plan.tasks if task.key not in states or not states[task.key].ended]
        left = sum(self.estimates[task.key] for task in unfinished if task.device not in self.unavailable) * pace / workers
        measured = {device.name for (_, device), key in self.measuring(states) if key in states and states[key].ended}
        here = [device for _, device in self.plan.devices if device.name not in self.unavailable and device.name not in measured]
        return left + sum(estimate_measuring(self.plan, device) for device in here)


def _unexpected(name: str, error: Exception) -> VitedgeError:
    """An error that is not ours, as one line."""
    text = " ".join(str(error).split())[:300]
    return VitedgeError(
        name, expected="a build", found=f"an unexpected {type(error).__name__}: {text}", fix="set VITEDGE_DEBUG=1 to see where"
    )


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
