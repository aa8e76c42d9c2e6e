"""What a run or a measurement ran on: versions of packages and of the code."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def versions(*packages: str) -> dict[str, str | None]:
    """Versions of Python, of PyTorch with its build, and of packages; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found | {"torch": torch.__version__}


def restarted() -> str | None:
    """Whether a launcher repeats a start of its own, by which variable: torchrun after a failure, Slurm's requeue.

    torchrun's count is asked only where it has no name for its launch: a first start that ended before it had begun
    anything is counted, too.
    """
    for name in ("SLURM_RESTART_COUNT", *(() if launch_id() else ("TORCHELASTIC_RESTART_COUNT",))):
        count = os.environ.get(name, "")
        if count.isdecimal() and int(count) > 0:
            return f"{name} {count}"
    return None


def launch_id() -> str | None:
    """What torchrun calls this launch: the same for all starts of its processes."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name == "none" else name  # what it says where nobody has given a name


def git_commit(apart: Sequence[str] = ()) -> dict[str, Any] | None:
    """Commit of the source tree that runs, and whether it was changed; None for an installed package.

    Args:
        apart: folders of the tree whose changes do not count.
    """
    file = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=file.parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("ls-files", "--error-unmatch", "--full-name", str(file))).name != file.name:
            return None
        where = [":/", *(f":(top,exclude){folder}" for folder in apart)]
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--", *where))}
    except (OSError, subprocess.CalledProcessError):
        return None
