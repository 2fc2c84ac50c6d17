"""Train the bundled model: recall first and short, then longer and longer, with text mixed in.

The length of the rows is raised when recall at the current length is solved.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from training.data import Lines, load_corpus, make_tokenizer
from training.rows import RowMaker, skip_positions

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
#: A length counts as solved when this share of first answer digits is right (running mean).
SOLVED = 0.95


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A new Qwen3 model of the sizes asked for."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=64,
        max_position_embeddings=args.max_positions,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="sdpa",
    )
    return Qwen3ForCausalLM(config)


def make_optimizers(model: torch.nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers (it needs fewer tokens), AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def schedule(elapsed: float, warmup: float, total: float, decay_from: float) -> float:
    """Learning-rate factor by the clock: linear warmup, flat, linear decay to 5 %."""
    if elapsed < warmup:
        return max(elapsed / warmup, 0.01)
    start = total * decay_from
    return 1.0 if elapsed < start else max(0.05, 1 - 0.95 * (elapsed - start) / (total - start))


KINDS = ("needle", "pair", "variable", "copy", "text", "names")


def kind_weights(level: int, late: bool) -> tuple[float, ...]:
    """Shares of the row kinds: recall alone, then mostly text, at the end mostly recall again."""
    if level == 0:
        return (0.25, 0.35, 0.0, 0.0, 0.0, 0.4)
    if level < 3:
        return (0.4, 0.35, 0.0, 0.0, 0.15, 0.1)
    if late:
        return (0.58, 0.12, 0.06, 0.06, 0.18, 0.0)
    return (0.2, 0.07, 0.07, 0.07, 0.59, 0.0)


def choose_length(rng: random.Random, level: int, top: int) -> int:
    """At first mostly the current length; once 2K is reached, short rows more than long ones.

    Recall that works at 1K needs only a few long rows to hold at 8K, and text is read faster in
    short ones.
    """
    level = min(level, top)
    if level < 5:
        return LENGTHS[level if rng.random() < 0.5 else rng.randint(max(0, level - 3), level)]
    usable = LENGTHS[1 : level + 1]
    return rng.choices(usable, [length**-0.5 for length in usable])[0]


@dataclass
class Progress:
    """What has to survive a restart besides the weights."""

    level: int = 0
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    #: Whether this run is in its last part, where the learning rate falls.
    late: bool = False


def batches(
    maker: RowMaker, args: argparse.Namespace, progress: Progress
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Endless batches: length, tokens, weights, answer mask, positions, kind of each row."""
    rng = maker.rng
    top = LENGTHS.index(args.max_length)
    while True:
        length = choose_length(rng, progress.level, top)
        first = progress.level < 2
        count = max(1, args.batch_tokens // length // (2 if first else 1))
        limit = length if first else args.max_positions
        max_keys = (4, 8, 12, 40)[min(progress.level, 3)]
        kinds = rng.choices(range(len(KINDS)), kind_weights(progress.level, progress.late), k=count)
        rows = [maker.row(KINDS[kind], length, max_keys) for kind in kinds]
        yield (
            length,
            np.array([r.tokens for r in rows]),
            np.array([r.weights for r in rows], dtype=np.float32),
            np.array([r.answers for r in rows]),
            np.stack([skip_positions(rng, length, limit) for _ in rows]),
            np.array(kinds),
        )


def save(
    folder: Path,
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    optimizers: list[torch.optim.Optimizer],
    progress: Progress,
    args: argparse.Namespace,
) -> None:
    """Write a checkpoint to go on from."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.save([o.state_dict() for o in optimizers], folder / "optimizers.pt")
    record = {**vars(progress), "arguments": {k: str(v) for k, v in vars(args).items()}}
    (folder / "progress.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def main() -> None:
    """Parse arguments and train until the clock says stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=float, default=60, help="seconds")
    parser.add_argument("--decay-from", type=float, default=0.6)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=1536)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--mlp", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--max-positions", type=int, default=8192)
    parser.add_argument("--max-length", type=int, default=8192, choices=LENGTHS)
    parser.add_argument("--start-level", type=int)
    parser.add_argument("--save-every", type=float, default=180, help="seconds")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch._dynamo.config.recompile_limit = 4 * len(LENGTHS)  # one compilation per length
    train, _ = load_corpus()
    progress = Progress()
    if args.resume:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.resume)
        model = Qwen3ForCausalLM.from_pretrained(args.resume, dtype=torch.float32)
        saved = json.loads((args.resume / "progress.json").read_text(encoding="utf-8"))
        progress = Progress(*(saved[k] for k in ("level", "step", "tokens", "seconds")))
    else:
        tokenizer = make_tokenizer(train, args.vocab)
        model = build_model(args, tokenizer)
    if args.start_level is not None:
        progress.level = args.start_level
    model.to(args.device).train()
    optimizers = make_optimizers(model, args)
    if args.resume and (args.resume / "optimizers.pt").exists():
        states = torch.load(args.resume / "optimizers.pt")
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)
    prose = [d for d in train if d.kind != "source"]
    maker = RowMaker(
        tokenizer,
        # Prose is a seventh of the corpus; three copies bring it to about a third of text rows.
        Lines(train + prose + prose, tokenizer),
        Lines(prose, tokenizer),
        args.seed + progress.step,
    )
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    run(model, tokenizer, maker, optimizers, progress, args)


def run(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    maker: RowMaker,
    optimizers: list[torch.optim.Optimizer],
    progress: Progress,
    args: argparse.Namespace,
) -> None:
    """The training loop."""
    compute = torch.compile(model, dynamic=False) if args.compile else model
    started = last_save = last_print = time.monotonic()
    before = progress.seconds
    printed_tokens = progress.tokens
    right: dict[tuple[int, str], float] = {}
    seen: Counter[tuple[int, str]] = Counter()
    text_loss: dict[int, float] = {}
    for length, tokens, weights, answers, positions, kinds in batches(maker, args, progress):
        elapsed = time.monotonic() - started
        if elapsed > args.minutes * 60:
            break
        progress.late = elapsed > args.minutes * 60 * args.decay_from
        factor = schedule(elapsed, args.warmup, args.minutes * 60, args.decay_from)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * factor
        ids = torch.from_numpy(tokens).to(args.device)
        with torch.autocast(args.device.split(":")[0], torch.bfloat16):
            logits = compute(
                input_ids=ids,
                position_ids=torch.from_numpy(positions).to(args.device),
                # No mask tensor: attention stays causal, and jumps in the position ids are not
                # taken for borders of packed sequences.
                attention_mask={"full_attention": None},
                use_cache=False,
            ).logits
        logits = logits[:, :-1].float()
        target = ids[:, 1:]
        each = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
        weight = torch.from_numpy(weights[:, 1:]).to(args.device)
        loss = (each * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.tokens += ids.numel()
        progress.seconds = before + time.monotonic() - started
        with torch.no_grad():
            hit = (logits.argmax(-1) == target).cpu().numpy()
        for kind in set(kinds.tolist()):
            mask = answers[:, 1:] & (kinds == kind)[:, None]
            if mask.any():
                slot = (length, KINDS[kind])
                score = float(hit[mask].mean())
                right[slot] = 0.9 * right.get(slot, score) + 0.1 * score
                seen[slot] += 1
            if KINDS[kind] == "text":
                value = float(each.detach()[torch.from_numpy(kinds == kind)].mean())
                text_loss[length] = 0.95 * text_loss.get(length, value) + 0.05 * value
        current = LENGTHS[min(progress.level, len(LENGTHS) - 1)]
        # Long batches have few rows: there, the one kind that matters most decides.
        deciding = ("needle", "pair") if progress.level < 3 else ("needle",)
        solved = all(seen[current, k] >= 8 and right[current, k] > SOLVED for k in deciding)
        if solved and current < args.max_length:
            progress.level += 1
            print(f"--- {current} solved at {progress.tokens / 1e6:.2f}M tokens", flush=True)
        now = time.monotonic()
        if now - last_print > 15:
            speed = (progress.tokens - printed_tokens) / (now - last_print)
            scores = " ".join(f"{n}{k[:2]}:{v:.2f}" for (n, k), v in sorted(right.items()))
            losses = " ".join(f"{n}:{v:.2f}" for n, v in sorted(text_loss.items()))
            print(
                f"{progress.seconds:.0f}s step {progress.step} {progress.tokens / 1e6:.2f}M "
                f"{speed:.0f}/s lr {factor:.2f} loss {loss.item():.3f} | {scores} | text {losses}",
                flush=True,
            )
            last_print, printed_tokens = now, progress.tokens
        if now - last_save > args.save_every:
            save(args.out, model, tokenizer, optimizers, progress, args)
            last_save = now
    save(args.out, model, tokenizer, optimizers, progress, args)


if __name__ == "__main__":
    main()
