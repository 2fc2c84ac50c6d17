"""Where and how a benchmark ran."""

import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

import bitkv


@dataclass(frozen=True)
class Environment:
    """Where and how the rows of one run were measured.

    Args:
        bandwidth_gbps: measured memory read bandwidth, GB/s, of memory as any tensor has it: around each
            row of attention, else at the start of the run.
        threads: torch's threads, in every measurement of the run.
        commit: of the source tree, "-dirty" if changed; None outside one.
        date: UTC, ISO 8601.
        huge_bandwidth_gbps: the same of memory in 2 MB pages, which pools of pages have on Linux.
    """

    bandwidth_gbps: float
    threads: int
    device: str
    torch: str
    command: str
    commit: str | None
    date: str
    huge_bandwidth_gbps: float | None = None

    @property
    def threads_text(self) -> str:
        return f"{self.threads} thread{'s' if self.threads > 1 else ''}"

    @property
    def bandwidth_text(self) -> str:
        huge = self.huge_bandwidth_gbps
        beside = "" if huge is None else f" ({huge:.1f} in huge pages)"
        return f"memory read {self.bandwidth_gbps:.1f} GB/s{beside}"


def environment_of_run(bandwidth_gbps: float, huge_gbps: float, command: str) -> Environment:
    """This process's environment, now."""
    return Environment(
        bandwidth_gbps=bandwidth_gbps,
        threads=torch.get_num_threads(),
        device=_device(),
        torch=torch.__version__,
        command=command,
        commit=_commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        huge_bandwidth_gbps=huge_gbps,
    )


def _device() -> str:
    try:
        return processor_name(Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        return processor_name("")


def processor_name(cpuinfo: str) -> str:
    """The processor's name, and its model's number where Linux tells: rented machines hide the name."""
    first, _, _ = cpuinfo.partition("\n\n")
    lines = [line.partition(":") for line in first.splitlines()]
    fields = {key.strip(): value.strip() for key, _, value in lines}
    name = fields.get("model name") or platform.processor() or platform.machine()
    family, model = fields.get("cpu family"), fields.get("model")
    return f"{name} (family {family}, model {model})" if family and model else name


def _commit() -> str | None:
    root = Path(bitkv.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
