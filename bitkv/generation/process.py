"""A generation run in a process of its own, so that no other run's memory or warm caches touch it.

The request goes in as one line of JSON, text comes back as lines of JSON while it is generated, the
figures as the last line.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import TextIO

from bitkv.generation.request import Request, Run

RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Environment in which glibc maps each block of 64 KiB and more by itself and unmaps it when freed.

By default it keeps much of what is freed and uses it again, so that a peak would hide in memory that an
earlier one left resident, or be counted long after it has passed.
"""


def generate_alone(request: Request, on_text: Callable[[str], None]) -> Run:
    """`generation.generate` in a fresh process.

    Raises:
        ValueError: what `generate` raises there.
        ChildProcessError: the process died.
    """
    command = [sys.executable, "-m", __name__]
    environment = os.environ | RETURN_FREED_MEMORY
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        ) as child,
    ):
        try:
            run = _converse(child, request, on_text)
        except BaseException:
            child.kill()
            raise
        if run is None:
            raise ChildProcessError(_why(child, errors))
    return run


def _converse(
    child: "subprocess.Popen[str]", request: Request, on_text: Callable[[str], None]
) -> Run | None:
    assert child.stdin is not None
    assert child.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it died already; its exit says why
        child.stdin.write(json.dumps(dataclasses.asdict(request)))
        child.stdin.close()
    for line in child.stdout:
        message = json.loads(line)
        if "text" in message:
            on_text(message["text"])
        elif "error" in message:
            raise ValueError(message["error"])
        else:
            return Run(**message["run"])
    return None


def _why(child: "subprocess.Popen[str]", errors: TextIO) -> str:
    code = child.wait()
    if code < 0:
        return f"the generating process was killed by signal {-code}; it may have run out of memory"
    errors.seek(0)
    last = errors.read().strip().rsplit("\n", 1)[-1]
    return f"the generating process failed: {last or f'exit code {code}'}"


def main() -> int:
    """Serve one request from standard input."""
    # the asking process imports this module too and needs no torch
    from bitkv.generation.checkpoint import quiet_transformers
    from bitkv.generation.measured import generate

    def send(**message: object) -> None:
        print(json.dumps(message), flush=True)

    quiet_transformers()
    try:
        request = Request(**json.load(sys.stdin))
        run = generate(request, lambda text: send(text=text))
    except (ValueError, OSError) as error:
        send(error=str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    send(run=dataclasses.asdict(run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
