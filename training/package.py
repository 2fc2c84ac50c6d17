"""Turn a checkpoint into the bundled assets: bf16 weights, tokenizer, texts, demo."""

from __future__ import annotations

import argparse
import json
import platform
import random
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3ForCausalLM

from bitkv.evaluation import tasks
from training.data import Document, load_corpus
from training.train import LENGTHS

HELD_OUT_CHARS = 320_000
CALIBRATION_CHARS, PIECE_CHARS = 300_000, 5_000
#: Prose that has nothing to do with Python; its licence permits verbatim copies.
PROSE = Path("/usr/share/common-licenses/GPL-3")
DOCUMENT_TOKENS = 7_200
#: Topics of the demo document, in reading order; all are held out by the split rule.
DOCUMENT_TOPICS = ("execmodel", "try", "assignment", "integers", "break")
PLANTED = ("aurora", "harbor", "falcon", "willow", "comet", "saffron")
ASKED = "aurora"


def held_out_text(held_out: list[Document]) -> str:
    """Held-out prose first, then whole source files in a fixed random order up to the limit."""
    prose = [d.text for d in held_out if d.kind == "topic"]
    prose += [d.text for d in held_out if d.kind == "docstrings"]
    source = [d.text for d in held_out if d.kind == "source" and len(d.text) < 60_000]
    random.Random(0).shuffle(source)
    text = "\n".join(prose)[: HELD_OUT_CHARS * 3 // 5]
    for part in source:
        if len(text) + len(part) < HELD_OUT_CHARS:
            text += "\n" + part
    return text


def calibration_text(train: list[Document], seed: int = 0) -> str:
    """Pieces of training documents, as much of each kind, in a random order: a prefix is mixed too."""
    rng = random.Random(seed)
    pieces: list[str] = []
    for kind in ("topic", "docstrings", "source"):
        documents = [d for d in train if d.kind == kind]
        used = 0
        for d in rng.sample(documents, len(documents)):
            piece = _piece(rng, d.text)
            if used + len(piece) > CALIBRATION_CHARS // 3:
                break
            pieces.append(piece)
            used += len(piece)
    prose = "\n".join(d.text for d in train if d.kind == "topic")
    while sum(map(len, pieces)) < CALIBRATION_CHARS * 4 // 3:
        pieces.append(_recall_piece(rng, prose))
    rng.shuffle(pieces)
    return "\n".join(pieces)


def _recall_piece(rng: random.Random, prose: str) -> str:
    """Facts in prose, each asked again at the end, as in the rows that the model was trained on."""
    keys = rng.sample(tasks.KEYS, 12)
    values = tasks.random_values(rng, len(keys), distinct_starts=False)
    facts = list(zip(keys, values, strict=True))
    tell, ask = rng.choice(
        [(tasks.needle_sentence, tasks.needle_sentence), (tasks.pair_line, tasks.pair_line),
         (tasks.assignment, lambda k, v: f"{tasks.variable_question(k)} {v}")]
    )  # fmt: skip
    lines = _piece(rng, prose).splitlines(keepends=True)
    for fact in facts:
        lines.insert(rng.randrange(len(lines) + 1), tell(*fact) + "\n")
    asked = [ask(*fact) + "\n" for fact in rng.sample(facts, len(facts))]
    return "".join(lines + asked)


def _piece(rng: random.Random, text: str) -> str:
    """Consecutive whole lines from a random place, of at most `PIECE_CHARS`."""
    lines = text.splitlines(keepends=True)
    start = rng.randrange(max(1, len(text) - PIECE_CHARS))
    chosen, begin, used = [], 0, 0
    for line in lines:
        if begin >= start and used + len(line) <= PIECE_CHARS:
            chosen.append(line)
            used += len(line)
        elif chosen:
            break
        begin += len(line)
    return "".join(chosen)


def write_texts(out: Path) -> None:
    """The texts that no checkpoint is needed for."""
    train, held_out = load_corpus()
    (out / "heldout.txt").write_text(held_out_text(held_out), encoding="utf-8")
    (out / "calibration.txt").write_text(calibration_text(train), encoding="utf-8")
    if PROSE.exists():  # part of every Debian; elsewhere the committed copy stays
        (out / "prose.txt").write_bytes(PROSE.read_bytes())


def demo_document(held_out: list[Document], count_tokens: Callable[[str], int]) -> str:
    """Held-out prose with one planted fact in every stretch of it."""
    by_name = {d.name: d.text for d in held_out if d.kind == "topic"}
    names = [*DOCUMENT_TOPICS, *sorted(set(by_name) - set(DOCUMENT_TOPICS))]
    paragraphs: list[str] = []
    used = 0
    for paragraph in "\n\n".join(by_name[n].strip() for n in names if n in by_name).split("\n\n"):
        cost = count_tokens(paragraph + "\n\n")
        if used + cost > DOCUMENT_TOKENS - 20 * len(PLANTED):
            break
        paragraphs.append(paragraph)
        used += cost
    rng = random.Random(7)
    for index, key in reversed(list(enumerate(PLANTED))):
        # The asked fact comes first, in the first tenth: far from the question.
        place = int(len(paragraphs) * (index + 0.5) / len(PLANTED))
        paragraphs.insert(place, tasks.needle_sentence(key, tasks.random_value(rng)))
    return "\n\n".join(paragraphs) + "\n\n"


def write_model(checkpoint: Path, out: Path) -> None:
    """Weights, tokenizer, where they came from, and a demo that the tokenizer can count."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    model = Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=64,
    )
    model.save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)

    saved = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))
    made = {
        "python": platform.python_version(),
        "parameters": model.num_parameters(),
        "tokens": saved["tokens"],
        "steps": saved["step"],
        "seconds": round(saved["seconds"]),
        "longest_rows": LENGTHS[min(saved["level"], len(LENGTHS) - 1)],
        "config": model.config.to_dict(),
    }
    (out / "training.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    _, held_out = load_corpus()
    document = demo_document(held_out, count_tokens)
    question = tasks.needle_question(ASKED)
    (out / "document.txt").write_text(document, encoding="utf-8")
    (out / "question.txt").write_text(question, encoding="utf-8")
    print(f"document: {len(document)} characters, {count_tokens(document + question)} tokens")


def main() -> None:
    """Write the assets folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="without one, only the texts are written")
    parser.add_argument("--out", type=Path, default=Path("bitkv/assets"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_texts(args.out)
    if args.checkpoint:
        write_model(args.checkpoint, args.out)


if __name__ == "__main__":
    main()
