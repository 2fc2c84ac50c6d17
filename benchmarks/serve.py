"""`make serve`: vLLM serves the bundled model from packed pages, and answers one question over HTTP."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI

from bitkv.generation.checkpoint import ASSETS

RECIPE = "kivi2"
BLOCK, SEQUENCES = 128, 8
COMMAND = f"python -m vllm.entrypoints.openai.api_server --model bitkv/assets --block-size {BLOCK}"
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
_PATIENCE = 300  # seconds


@dataclass(frozen=True)
class Server:
    """One that answers at `url`, and what it has written."""

    url: str
    log: Path

    @property
    def cache_tokens(self) -> int:
        """Tokens that its KV cache has room for, as vLLM says."""
        found = re.search(r"KV cache size: ([\d,]+) tokens", self.log.read_text(encoding="utf-8"))
        if found is None:
            raise RuntimeError("vLLM has not said how large its cache is")
        return int(found[1].replace(",", ""))


@contextmanager
def serving(recipe: str, *, gib: int = 1) -> Iterator[Server]:
    """`vllm serve` with a cache of so many GiB; without a recipe, vLLM's own cache in 16 bits."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        log, template = Path(folder) / "log.txt", Path(folder) / "chat.jinja"
        template.write_text(TEMPLATE, encoding="utf-8")
        options = [
            *("--port", str(port), "--host", "127.0.0.1", "--served-model-name", "bitkv"),
            *("--max-model-len", "8192"),
            *("--max-num-seqs", str(SEQUENCES), "--block-size", str(BLOCK)),
            *("--chat-template", str(template), "--enforce-eager"),
        ]
        env = os.environ | {"BITKV_RECIPE": recipe, "VLLM_CPU_KVCACHE_SPACE": str(gib)}
        with log.open("w", encoding="utf-8") as out:
            # what `vllm serve` runs, whose own program asks for a distribution that is called vllm
            command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
            command += ["--model", str(ASSETS), *options]
            # a group of its own: its engine is a process too, and must not outlive it
            process = subprocess.Popen(
                command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            _wait(f"http://127.0.0.1:{port}/health", process, log)
            yield Server(f"http://127.0.0.1:{port}/v1", log)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    begin = time.monotonic()
    while time.monotonic() - begin < _PATIENCE:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended:\n{log.read_text(encoding='utf-8')[-4000:]}")
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the server was not ready after {_PATIENCE} s")


def streamed(server: Server, text: str, *, tokens: int) -> Iterator[str]:
    """Pieces of an answer to one message, as they come."""
    client = OpenAI(base_url=server.url, api_key="none")
    stream = client.chat.completions.create(
        model="bitkv",
        messages=[{"role": "user", "content": text}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            yield chunk.choices[0].delta.content


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then too
    document = (ASSETS / "document.txt").read_text(encoding="utf-8")
    question = (ASSETS / "question.txt").read_text(encoding="utf-8")
    print(f"$ BITKV_RECIPE={RECIPE} {COMMAND}", flush=True)
    with serving(RECIPE) as server:
        print("answer: ", end="", flush=True)
        for piece in streamed(server, document + question, tokens=16):
            print(piece, end="", flush=True)
        packed = server.cache_tokens
    print(f"\n\n$ {COMMAND}", flush=True)
    with serving("") as server:
        stock = server.cache_tokens
    # the slots of unfinished blocks lie beside the cache, in 16 bits
    packed = int(packed * (1 - (SEQUENCES + 2) * BLOCK / stock))
    print(f"tokens a GiB: {packed:,} with {RECIPE}, {stock:,} in bfloat16, {packed / stock:.2f} times")
    return 0


if __name__ == "__main__":
    sys.exit(main())
