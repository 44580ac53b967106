"""The environment of a user whom engines would watch."""

from __future__ import annotations

import os
from pathlib import Path

# What says that nobody is there, which engines take as a wish not to be watched, or says so outright.
_SILENCING = ("CI", "TF_BUILD", "GITHUB_ACTIONS", "JENKINS_URL", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS")


def watched(home: Path) -> dict[str, str]:
    """This process's environment without all that, its home an empty folder made here."""
    home.mkdir()
    left_out = tuple(name for name in os.environ if name in _SILENCING or name.startswith(("XDG_", "PYTEST_")))
    return {name: value for name, value in os.environ.items() if name not in left_out} | {"HOME": str(home)}
