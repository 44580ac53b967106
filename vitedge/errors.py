"""The errors vitedge raises, and the exit code each one ends a command with.

    VitedgeError            1  something failed
    |-- InputError          1  data, weights, a model file or a bundle is not what it must be
    |-- OutputError         1  the result cannot be written
    |-- WorkerError         1  a measuring process died
    |-- UsageError          2  arguments, a recipe or a device profile are wrong
    |-- GateError           3  a limit on accuracy, parity, size or latency was missed
    |-- UnavailableError    4  a device, provider, precision or optional package is not there
    `-- UnstableError       5  a measurement did not settle

Library code raises them; only `vitedge.cli` prints them and exits. Every one carries what was
expected, what was found and what to do, and reads as one line.
"""

from __future__ import annotations


class VitedgeError(Exception):
    """Something the user can act on.

    Args:
        where: The file, option or thing that is wrong.
        expected: What should have been there.
        found: What was there.
        fix: What to do about it, as an imperative.
    """

    exit_code = 1

    def __init__(self, where: str, *, expected: str, found: str, fix: str) -> None:
        self.where, self.expected, self.found, self.fix = where, expected, found, fix
        super().__init__(where)

    def __str__(self) -> str:
        text = f"{self.where}: expected {self.expected}, found {self.found}; {self.fix}"
        return " ".join(text.split())


class InputError(VitedgeError):
    """Data, weights, a model file or a bundle is not what it must be."""


class OutputError(VitedgeError):
    """The result cannot be written."""


class WorkerError(VitedgeError):
    """A measuring process died or did not answer."""


class UsageError(VitedgeError):
    """Arguments, a recipe or a device profile are wrong."""

    exit_code = 2


class GateError(VitedgeError):
    """A limit on accuracy, parity, size or latency was missed."""

    exit_code = 3


class UnavailableError(VitedgeError):
    """A device, provider, precision or optional package is not there."""

    exit_code = 4


class UnstableError(VitedgeError):
    """A measurement did not settle within its time limit."""

    exit_code = 5


class FileProblems(UsageError):  # noqa: N818 - several errors, not one
    """Every problem of one recipe or device file at once, one line each."""

    def __init__(self, where: str, problems: list[UsageError]) -> None:
        super().__init__(where, expected="a valid file", found=f"{len(problems)} problems", fix="mend the lines below")
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class ExtraMissingError(UnavailableError):
    """A package that an extra of vitedge installs."""


def extra_missing(what: str, extra: str) -> ExtraMissingError:
    """The error for a command whose optional dependencies are not installed."""
    return ExtraMissingError(
        what,
        expected=f"the packages of the [{extra}] extra",
        found="they are not installed",
        fix=f"run: pip install 'vitedge[{extra}]'",
    )


def closest(word: str, candidates: list[str]) -> str:
    """`" (did you mean 'x'?)"` for the nearest candidate, or nothing."""
    import difflib

    near = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""
