"""A real SQLite storage: claims are exclusive between processes, and what a dead process ran waits again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vitedge.errors import InputError, UnavailableError, UsageError
from vitedge.study.queue import Queue
from vitedge.study.storage import LOST, STORAGE_FILE, WORKER, close_storage, hand_back, heartbeat, open_storage, reclaim, signature

pytest.importorskip("optuna")

NAMES = {f"key{number}": f"task {number}" for number in range(30)}

CLAIMER = """
import sys, time
from pathlib import Path
from vitedge.study.queue import Queue
folder, keys = Path(sys.argv[1]), sys.argv[2].split(",")
with Queue(folder, None, "shared") as queue:
    states = queue.states()
    print("ready", flush=True)
    sys.stdin.readline()
    for key in keys:
        claim = queue.claim(states[key])
        if claim is not None:
            print(key, flush=True)
            claim.done(0.0, {})
"""
DIES = """
import os, sys
from pathlib import Path
from vitedge.study.queue import Queue
queue = Queue(Path(sys.argv[1]), None, "shared")
claim = queue.claim(queue.states()["key0"])
assert claim is not None
os._exit(0)
"""


def states_of(queue: Queue) -> dict[str, str]:
    return {key: state.name for key, state in queue.states().items()}


def test_two_processes_never_claim_one_task(tmp_path: Path) -> None:
    with Queue(tmp_path, None, "shared") as queue:
        queue.refresh(NAMES)
    command = [sys.executable, "-c", CLAIMER, str(tmp_path), ",".join(NAMES)]
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for worker in workers:
        assert worker.stdout is not None and worker.stdout.readline().strip() == "ready"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    took = [worker.communicate(timeout=120)[0].split() for worker in workers]
    assert all(worker.returncode == 0 for worker in workers)
    assert sorted(took[0] + took[1]) == sorted(NAMES)
    with Queue(tmp_path, None, "shared") as queue:
        assert set(states_of(queue).values()) == {"done"}


def test_what_a_dead_process_ran_waits_again_and_is_counted(tmp_path: Path) -> None:
    with Queue(tmp_path, None, "shared") as queue:
        queue.refresh({"key0": "task 0"})
        done = subprocess.run([sys.executable, "-c", DIES, str(tmp_path)], timeout=120)
        assert done.returncode == 0
        assert queue.states()["key0"].name == "running"
        lost = queue.states()["key0"].trial
        assert reclaim(queue.study) == [lost]
        state = queue.states()["key0"]
        assert state.name == "waiting" and state.trial != lost and state.lost == 1
        assert reclaim(queue.study) == []
        again = queue.study.get_trials(deepcopy=False)[state.trial]
        assert WORKER not in again.user_attrs and again.user_attrs[LOST] == 1
        assert len(queue.study.get_trials(deepcopy=False)) == 2


def test_what_a_living_process_runs_stays_its_own(tmp_path: Path) -> None:
    with Queue(tmp_path, None, "shared") as queue:
        queue.refresh({"key0": "task 0"})
        claim = queue.claim(queue.states()["key0"])
        assert claim is not None
        signed = queue.study.get_trials(deepcopy=False)[0].user_attrs[WORKER]
        own = signature()
        assert (signed["host"], signed["pid"]) == (own["host"], own["pid"]) and abs(signed["started"] - own["started"]) < 1.0
        assert reclaim(queue.study) == [] and states_of(queue) == {"key0": "running"}
        assert queue.claim(queue.states()["key0"]) is None  # running already
        claim.hand_back()
        assert states_of(queue) == {"key0": "waiting"} and queue.states()["key0"].lost == 0
        assert not claim.done(1.0, {})  # it is no longer ours
        assert states_of(queue) == {"key0": "waiting"}


@pytest.mark.parametrize("change", [{"pid": 2**22 + 1}, {"started": 1.0}], ids=["no such process", "another process since"])
def test_a_signature_without_its_process_is_lost(tmp_path: Path, change: dict[str, Any]) -> None:
    with Queue(tmp_path, None, "shared") as queue:
        queue.refresh({"key0": "task 0"})
        assert queue.claim(queue.states()["key0"]) is not None
        trial = queue.study.get_trials(deepcopy=False)[0]
        queue.storage.set_trial_user_attr(trial._trial_id, WORKER, {**signature(), **change})
        assert reclaim(queue.study) == [0]


def test_another_hosts_worker_is_left_to_its_heartbeat(tmp_path: Path) -> None:
    with Queue(tmp_path, None, "shared") as queue:
        queue.refresh({"key0": "task 0"})
        assert queue.claim(queue.states()["key0"]) is not None
        trial = queue.study.get_trials(deepcopy=False)[0]
        queue.storage.set_trial_user_attr(trial._trial_id, WORKER, {**signature(), "host": "elsewhere", "pid": 2**22 + 1})
        with heartbeat(queue.storage, trial._trial_id):
            assert reclaim(queue.study) == []
        # As if the last sign of life were four minutes old.
        from sqlalchemy import text

        with queue.storage.engine.begin() as connection:
            connection.execute(text("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-4 minutes')"))
        assert reclaim(queue.study) == [0] and queue.states()["key0"].name == "waiting"


def test_a_handed_back_trial_keeps_what_was_said_of_it(tmp_path: Path) -> None:
    import optuna

    storage = open_storage(tmp_path)
    study = optuna.create_study(storage=storage, study_name="search", sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial({"ratio": 0.5}, user_attrs={"why": "by hand"})
    waiting = study.get_trials(deepcopy=False)[0]
    storage.set_trial_state_values(waiting._trial_id, optuna.trial.TrialState.RUNNING)
    hand_back(study, 0)
    again = study.get_trials(deepcopy=False)[1]
    assert again.state == optuna.trial.TrialState.WAITING
    assert again.user_attrs["why"] == "by hand" and again.system_attrs["fixed_params"] == {"ratio": 0.5}
    close_storage(storage)


def test_a_folder_with_braces_holds_its_own_storage(tmp_path: Path) -> None:
    folder = tmp_path / "a {study} here"
    close_storage(open_storage(folder))
    close_storage(open_storage(folder))
    assert (folder / STORAGE_FILE).is_file()


def test_a_file_that_is_no_storage_is_one_line(tmp_path: Path) -> None:
    (tmp_path / STORAGE_FILE).write_bytes(b"thesis " * 1000)
    with pytest.raises(InputError, match="expected a study's storage"):
        open_storage(tmp_path)
    assert (tmp_path / STORAGE_FILE).read_bytes() == b"thesis " * 1000


def test_a_url_that_leads_nowhere_is_one_line_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        open_storage(tmp_path, "nonsense://me:secret@host/name")
    assert "--storage nonsense://host/name" in str(caught.value) and "secret" not in str(caught.value)


def test_without_the_extra_it_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"vitedge\[search\]"):
        open_storage(tmp_path)


def test_what_was_begun_with_is_held_to(tmp_path: Path) -> None:
    with Queue(tmp_path, None, "shared") as queue:
        queue.hold_to("--budget", "", "all of the work", "give the same budget")
        queue.hold_to("--budget", "", "all of the work", "give the same budget")
        queue.hold_to("data set cifar10", "00ff", "one.tar (00ff)", "give the same bytes")
    with Queue(tmp_path, None, "shared") as queue:
        queue.hold_to("data set cifar10", "00ff", "elsewhere/one.tar (00ff)", "give the same bytes")
        with pytest.raises(UsageError, match=r"data set cifar10: .* begun with: one\.tar \(00ff\), found two\.tar \(ff00\); choose"):
            queue.hold_to("data set cifar10", "ff00", "two.tar (ff00)", "give the same bytes")


def test_a_failed_task_is_put_in_again_only_when_asked(tmp_path: Path) -> None:
    with Queue(tmp_path, None, "shared") as queue:
        queue.refresh({"key0": "task 0"})
        claim = queue.claim(queue.states()["key0"])
        assert claim is not None
        assert claim.failed(UsageError("recipe", expected="a ratio", found="2", fix="lower it"))
        state = queue.refresh({"key0": "task 0"})["key0"]
        assert (state.name, state.exit_code) == ("failed", 2) and "lower it" in state.reason
        assert queue.refresh({"key0": "task 0"}, again=True)["key0"].name == "waiting"
