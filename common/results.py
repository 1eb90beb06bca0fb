"""The head that every committed result file carries, so that its numbers can be made again."""

from __future__ import annotations

import datetime
import platform
from typing import Any

import torch

from common.runs import git_commit, versions


def provenance(command: str) -> dict[str, Any]:
    """When, with what and by which command a result was made.

    Args:
        command: as a user would type it from the repository's root.
    """
    cuda = torch.cuda.is_available()
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "versions": versions(),
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
    }
