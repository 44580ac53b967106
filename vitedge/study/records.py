"""The trials of a search as Optuna's storage keeps them, read back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vitedge.study.point import Point
from vitedge.study.space import Settings, Space

if TYPE_CHECKING:
    import optuna

# User attributes of a trial.
SETTINGS, POINTS, SKIPPED, CONDITIONS, FAILURE, DUPLICATE_OF, SECONDS = (
    "settings", "points", "skipped", "conditions", "failure", "duplicate_of", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """One trial.

    Attributes:
        number: Its number.
        state: Optuna's: WAITING | RUNNING | COMPLETE | PRUNED (it failed) | FAIL (its process was lost, another one has its settings).
        settings: Value by path.
        digest: Identity of its recipe, hex; empty while it has none.
        points: Of its files; empty where it failed or is the same as another.
        failure: Why it failed.
        duplicate_of: The trial that had the same settings before.
        seconds: It took.
        skipped: Files that were not measured, and why.
        conditions: They were measured under.
    """

    number: int
    state: str
    settings: Settings
    digest: str
    points: tuple[Point, ...]
    failure: str
    duplicate_of: int | None
    seconds: float | None
    skipped: tuple[str, ...]
    conditions: dict[str, Any]

    @property
    def ended(self) -> bool:
        """Whether it came to an end, good or bad."""
        return self.state in ("COMPLETE", "PRUNED")

    @property
    def counts(self) -> bool:
        """Whether it is one of the different settings that are tried, or being tried."""
        return self.duplicate_of is None and (self.ended or self.state == "RUNNING")

    def to_plain(self) -> dict[str, Any]:
        """Plain data for JSON, without its points."""
        return {
            "number": self.number,
            "state": "failed" if self.failure else self.state.lower(),
            "settings": self.settings,
            "digest": self.digest,
            "failure": self.failure or None,
            "duplicate_of": self.duplicate_of,
            "seconds": self.seconds,
            "skipped": list(self.skipped),
            "conditions": self.conditions,
        }


def records_of(study: optuna.Study, space: Space) -> list[Record]:
    """Every trial, in order; without those that were lost, whose settings another one has."""
    records = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name == "FAIL":
            continue
        kept = trial.user_attrs
        ended = trial.state.is_finished()
        records.append(
            Record(
                number=trial.number,
                state=trial.state.name,
                settings=space.read(trial.params),
                digest=kept.get(SETTINGS, ""),
                points=tuple(Point.from_plain(plain) for plain in kept.get(POINTS, ())) if ended else (),
                failure=kept.get(FAILURE, "") if ended else "",
                duplicate_of=kept.get(DUPLICATE_OF) if ended else None,
                seconds=kept.get(SECONDS) if ended else None,
                skipped=tuple(kept.get(SKIPPED, ())),
                conditions=kept.get(CONDITIONS, {}),
            )
        )
    return records
