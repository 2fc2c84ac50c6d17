"""Every test starts from one seed, and memory that nobody has written reads as NaN or 0xFF.

Without a GPU, Triton's interpreter runs the GPU's kernels on CPU tensors.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

settings.register_profile("bitkv", derandomize=True, deadline=None, max_examples=30)
settings.load_profile("bitkv")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # Triton looks when it is imported, by transformers at the latest
    )
torch.set_num_threads(1)  # tensors are tiny here: threads cost more than they give


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_poison(*args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            x = allocate(*args, **kwargs)
            if x.is_floating_point() or x.is_complex():
                return x.fill_(torch.nan)
            if x.dtype in (torch.uint8, torch.bool):
                return x.fill_(0xFF)
            return x.fill_(torch.iinfo(x.dtype).min)

    return allocate_poison


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny random Qwen3 with a tokenizer of bytes and a context of 2048."""
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<bos>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    config = Qwen3Config(
        vocab_size=len(vocab),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        initializer_range=1.0,  # at 0.02 it says one token for ever
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    ).save_pretrained(path)
    return path
