"""Which of a study's devices are here."""

from __future__ import annotations

from vitedge.device import require_accelerator
from vitedge.errors import UnavailableError
from vitedge.host import probe_host
from vitedge.study.plan import Plan


def find_unavailable(plan: Plan) -> dict[str, str]:
    """Devices whose accelerator is not on this host, with the reason."""
    host, found = probe_host(), {}
    for _, device in plan.devices:
        try:
            require_accelerator(device, host)
        except UnavailableError as error:
            found[device.name] = str(error)
    return found


def require_one(plan: Plan) -> dict[str, str]:
    """As `find_unavailable`.

    Raises:
        UnavailableError: None of the devices is here; says why for the last.
    """
    unavailable = find_unavailable(plan)
    if len(unavailable) == len(plan.devices):
        require_accelerator(plan.devices[-1][1], probe_host())
    return unavailable
