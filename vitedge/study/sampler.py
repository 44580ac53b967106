"""What Optuna proposes: the tree-structured Parzen estimator for several objectives, with constraints.

TPE rather than NSGA-II: a search of hours has tens of trials, and a genetic algorithm's first generation is as many drawn at random.
Constraints are those that a trial carries (`Trial.set_constraint`); settings that other workers are running are avoided.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vitedge.artifact import digest_of
from vitedge.study.records import DUPLICATE_OF

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial, TrialState

STARTUP = (4, 10)  # fewest and most trials drawn at random before the estimator has its say
STARTUP_SHARE = 4  # between them, one of so many trials
NEVER = 10**9  # trials until the estimator has its say


def make_sampler(seed: int, trials: int) -> BaseSampler:
    """A sampler whose random numbers are a function of the seed and a trial's number; after a repeat it draws at random.

    Trials are numbered by the storage, so that neither two workers nor a worker that starts again draw the same.

    Args:
        seed: Of the search.
        trials: How many the search is for.
    """
    from optuna.samplers import BaseSampler, TPESampler

    startup = min(max(STARTUP[0], trials // STARTUP_SHARE), STARTUP[1])

    def of_number(number: int, at_random: bool = False) -> TPESampler:
        return TPESampler(seed=int(digest_of(seed, number)[:8], 16), multivariate=True, n_startup_trials=NEVER if at_random else startup)

    class SeededByNumber(BaseSampler):  # type: ignore[misc]  # its types are not followed
        """TPE, made anew for each trial."""

        def __init__(self) -> None:
            self._inner = of_number(0)

        def before_trial(self, study: Study, trial: FrozenTrial) -> None:
            ended = [one for one in study.get_trials(deepcopy=False) if one.state.name in ("COMPLETE", "PRUNED")]
            # The estimator may well propose the best settings of a small space for ever.
            self._inner = of_number(trial.number, at_random=bool(ended) and DUPLICATE_OF in ended[-1].user_attrs)
            self._inner.before_trial(study, trial)

        def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
            found: dict[str, BaseDistribution] = self._inner.infer_relative_search_space(study, trial)
            return found

        def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
            drawn: dict[str, Any] = self._inner.sample_relative(study, trial, search_space)
            return drawn

        def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
            return self._inner.sample_independent(study, trial, param_name, param_distribution)

        def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
            self._inner.after_trial(study, trial, state, values)

    return SeededByNumber()
