"""Which of its run's processes this is, as torchrun, `accelerate launch` and `vitedge train --processes` say it.

Needs no torch to answer, so that only process 0 plans, prints and writes.
"""

from __future__ import annotations

import os

# Set by `vitedge train --processes`, whose own process then reports failures to programs.
LAUNCHED = "VITEDGE_LAUNCHED"


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_launched() -> bool:
    """Whether a launcher started this process, and ends it."""
    return "RANK" in os.environ


def local_world_size() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def reports_failures() -> bool:
    """Whether this process writes its error to stdout under `--json`: one of a run does."""
    return is_main() and LAUNCHED not in os.environ


def is_main() -> bool:
    """Whether this is process 0, the one that prints and writes."""
    return rank() == 0
