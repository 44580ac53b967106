"""Optuna's storage as the queue of a study: one SQLite file or a database server, and trials whose process died.

A trial is waiting, running or finished, and changes state in one transaction of the database, so that several
workers share the trials without a queue of our own. A worker signs what it runs; a signature whose process is gone
means that the trial was lost, and it is put back at once. A worker on another machine cannot be asked, so there the
heartbeat it left in the storage decides, after a grace.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitedge.artifact import saying_where
from vitedge.errors import InputError, UnavailableError, UsageError, VitedgeError, extra_missing

if TYPE_CHECKING:
    import optuna

STORAGE_FILE, STORAGE_LOCK = "study.db", ".storage.lock"
WORKER = "worker"  # the user attribute that a signature is kept under
LOST = "lost"  # and the one that counts how often a process died over a trial
HEARTBEAT_S = 60
GRACE_S = 180  # of a worker on another machine
UNSIGNED_S = 30.0  # between a claim and its signature lie milliseconds, unless the process died there
BUSY_S = 60.0  # how long a transaction waits for that of another process
_SAME_START_S = 30.0  # a clock that was set since must not make a living process look like another


def open_storage(folder: Path, url: str | None = None) -> optuna.storages.RDBStorage:
    """The storage of a study, made where there is none yet; close it with `close_storage`.

    Args:
        folder: The study's folder, whose `study.db` it is where no URL is given.
        url: A database as SQLAlchemy names it, when several machines work on one study.

    Raises:
        UnavailableError: Optuna, or the driver of the database, is not installed.
        UsageError: The URL leads to no database.
        InputError: The file is there and is no storage.
        OutputError: The folder cannot be written.
    """
    optuna = _optuna()
    from filelock import FileLock
    from sqlalchemy.exc import SQLAlchemyError

    file = (folder / STORAGE_FILE).resolve()
    # Optuna formats the address, so that braces in a folder's name would be read as fields.
    address = url or f"sqlite:///{str(file).replace('{', '{{').replace('}', '}}')}"
    is_sqlite = address.startswith("sqlite")
    engine: dict[str, Any] = {"connect_args": {"timeout": BUSY_S}} if is_sqlite else {"pool_pre_ping": True}
    with saying_where(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # Two workers that start at once would both make the tables.
        with FileLock(folder / STORAGE_LOCK), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            try:
                storage = optuna.storages.RDBStorage(
                    address,
                    engine_kwargs=engine,
                    heartbeat_interval=HEARTBEAT_S,
                    grace_period=GRACE_S,
                    heartbeat_stale_trial_callback=_enqueue_again,
                )
            except ImportError as error:
                raise UnavailableError(
                    f"--storage {_place(address)}",
                    expected="the Python driver of that database",
                    found=str(error.__cause__ or error),
                    fix="install it with pip, as psycopg2-binary for postgresql:// or pymysql for mysql+pymysql://",
                ) from error
            except (SQLAlchemyError, RuntimeError, optuna.exceptions.StorageInternalError) as error:
                raise _not_a_storage(error, None if url else file, address) from error
    if is_sqlite:
        _claim_in_one_transaction(storage.engine)
    return storage


def close_storage(storage: optuna.storages.RDBStorage) -> None:
    """Close the connections; the storage is opened again where it is used again."""
    storage.remove_session()
    storage.engine.dispose()


def sign(trial: optuna.Trial) -> None:
    """Write into a running trial which process it is that runs it, and a first sign of life; `heartbeat` gives the further ones."""
    trial.storage.record_heartbeat(trial._trial_id)  # before the signature: one without the other is never found stale
    trial.set_user_attr(WORKER, signature())


def signature() -> dict[str, Any]:
    """This process: its host, its number, and when it started, seconds since 1970."""
    import psutil

    return {"host": this_host(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def this_host() -> str:
    """Name of the space that process numbers are valid in: the host's name, its boot and the container's numbering.

    Two machines may both be called `localhost`; what runs on one must not be looked for on the other.
    """
    boot, numbering = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = [socket.gethostname(), boot.read_text(encoding="ascii").strip() if boot.is_file() else ""]
    return "/".join([*parts, str(numbering.readlink()) if numbering.is_symlink() else ""])


def reclaim(study: optuna.Study) -> list[int]:
    """Put back what dead workers ran: the trial fails, and one like it waits again.

    A trial of this host is put back when the process that signed it is gone, one that nobody signed after 30 s, and any, whose host
    cannot be asked or whose process sleeps, when its heartbeat is older than three minutes. A worker calls it between trials.

    Returns:
        Numbers of the trials that were put back.
    """
    import optuna

    running, failed = optuna.trial.TrialState.RUNNING, optuna.trial.TrialState.FAIL
    storage = study._storage
    found = study.get_trials(deepcopy=False, states=(running,))
    for trial in found:
        if not _is_lost(trial):
            continue
        # Another worker may have seen it too: who fails it puts it back.
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            storage.set_trial_state_values(trial._trial_id, failed)
            _enqueue_again(study, trial)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
    gone = {trial.number for trial in study.get_trials(deepcopy=False, states=(failed,))}
    return [trial.number for trial in found if trial.number in gone]


def hand_back(study: optuna.Study, number: int) -> None:
    """Put a trial that this process runs back into the queue, as when it is told to end.

    Args:
        study: Where it is.
        number: The trial's.
    """
    import optuna

    trial = next(trial for trial in study.get_trials(deepcopy=False) if trial.number == number)
    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # put back already, as one that was lost
        study._storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.FAIL)
        _add_waiting(study, trial, {})


@contextlib.contextmanager
def heartbeat(storage: optuna.storages.RDBStorage, trial_id: int) -> Iterator[None]:
    """Say once a minute that a trial is worked on, for workers on other machines; for trials that `Study.optimize` does not run."""
    import optuna

    stopped = threading.Event()

    def beat() -> None:
        try:
            while True:
                # A database that was busy or away is told at the next beat; its absence must not end the work.
                with contextlib.suppress(optuna.exceptions.StorageInternalError):
                    storage.record_heartbeat(trial_id)
                if stopped.wait(HEARTBEAT_S):
                    return
        finally:
            storage.remove_session()

    thread = threading.Thread(target=beat, name="vitedge-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _optuna() -> Any:
    """The library, quiet: what a trial does is told by us.

    Raises:
        UnavailableError: It is not installed.
    """
    from importlib.util import find_spec

    if find_spec("optuna") is None:
        raise extra_missing("vitedge study and vitedge search", "search")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _claim_in_one_transaction(engine: Any) -> None:
    """Take SQLite's write lock where a transaction begins, not where it first writes.

    Optuna claims a trial by reading its state `for update` and then writing it. SQLite knows no `for update`: two
    processes could both read `waiting` and both claim. (sqlalchemy, "Serializable isolation / Savepoints" of pysqlite.)
    """
    from sqlalchemy import event

    def leave_begin_to_us(connection: Any, _record: Any) -> None:
        connection.isolation_level = None

    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections that were opened before know nothing of it
    event.listen(engine, "connect", leave_begin_to_us)
    event.listen(engine, "begin", begin)


def _enqueue_again(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """One more waiting trial like this one, which was lost once more."""
    _add_waiting(study, trial, {LOST: trial.user_attrs.get(LOST, 0) + 1})


def _add_waiting(study: optuna.Study, trial: optuna.trial.FrozenTrial, changes: dict[str, Any]) -> None:
    """A waiting trial like this one, unsigned."""
    import optuna

    kept = {key: value for key, value in trial.user_attrs.items() if key != WORKER}
    study.add_trial(
        optuna.trial.create_trial(
            state=optuna.trial.TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={**kept, **changes},
            system_attrs=trial.system_attrs,
        )
    )


def _is_lost(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether no process of this host runs it any more; of other hosts nothing is known here."""
    import psutil

    signed = trial.user_attrs.get(WORKER)
    if signed is None:
        began = trial.datetime_start
        return began is not None and (datetime.now() - began).total_seconds() > UNSIGNED_S
    if signed["host"] != this_host():
        return False
    try:
        process = psutil.Process(signed["pid"])
        started: float = process.create_time()
        return bool(abs(started - signed["started"]) > _SAME_START_S) or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _not_a_storage(error: Exception, file: Path | None, address: str) -> VitedgeError:
    """The one line for a file or URL that Optuna cannot work with."""
    found = str(error.__cause__ or error).splitlines()[0]
    if file is not None:
        return InputError(str(file), expected="a study's storage", found=found, fix="move it away, or choose another folder with -o")
    return UsageError(
        f"--storage {_place(address)}",
        expected="a database, as sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME",
        found=found,
        fix="check the URL and that the server answers",
    )


def _place(address: str) -> str:
    """A URL without its user and password."""
    scheme, separator, rest = address.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
