"""Starting the processes of a run on this machine, by torch's elastic launcher (what `torchrun` is)."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid

import torch
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from vitedge.errors import UnavailableError, VitedgeError
from vitedge.launch import LAUNCHED


def start(processes: int, arguments: list[str]) -> int:
    """Run `vitedge ARGUMENTS` in so many processes.

    Returns:
        Their exit code: 0, or that of the first process that failed, which has said why on stderr.

    Raises:
        UnavailableError: There are GPUs, but fewer.
        VitedgeError: A process was killed.
        KeyboardInterrupt: This process was told to end; the others have saved and ended before.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise UnavailableError(
            "--processes",
            expected=f"at most one process for each of {gpus} GPUs",
            found=f"{processes} processes",
            fix=f"give --processes {gpus}, or set CUDA_VISIBLE_DEVICES= to train on the CPU",
        )
    # The launcher logs each signal it passes on; people are told once, below.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # A process that is saving must not be killed (torch's default is half a minute, where it can be set).
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    # Else Accelerate warns that it chose a number of threads; vitedge sets it after that.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ[LAUNCHED] = "1"
    try:
        # The launcher leaves a folder of its own behind where none is given.
        with tempfile.TemporaryDirectory(prefix="vitedge-launch-") as logs:
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=processes,
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                max_restarts=0,
                monitor_interval=0.1,
                logs_specs=DefaultLogsSpecs(log_dir=logs),
            )
            elastic_launch(config, sys.executable)("-m", "vitedge", *arguments)
    except SignalException as error:
        raise KeyboardInterrupt from error
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return int(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        raise VitedgeError(
            f"process {number} of {processes}",
            expected="all processes to stay alive",
            found=f"ended by {name}",
            fix="run the same command again: it goes on from the last checkpoint",
        ) from error
    finally:
        del os.environ[LAUNCHED]  # what is raised here, this process reports
    return 0
