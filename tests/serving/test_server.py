"""bitkv behind vLLM's HTTP server."""

from benchmarks.serve import serving, streamed
from bitkv.generation.checkpoint import ASSETS


def test_a_streamed_chat_completion_finds_the_code_in_a_packed_document():
    document = (ASSETS / "document.txt").read_text(encoding="utf-8")
    question = (ASSETS / "question.txt").read_text(encoding="utf-8")
    with serving("kivi2") as server:
        pieces = list(streamed(server, document + question, tokens=8))
        assert len(pieces) > 1
        assert "90996" in "".join(pieces)
        assert server.cache_tokens > 5 * 524_288  # vLLM's own, in 16 bits: 2 KB a token
