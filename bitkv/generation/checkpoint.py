"""Models and tokenizers from a directory or the hub, with one sentence for whatever goes wrong."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from bitkv.generation.request import DTYPES

ASSETS = Path(__file__).parents[1] / "assets"


def locate(model: str | None) -> str:
    """The directory or hub id to load: the bundled model for None.

    Raises:
        ValueError: a path that does not exist, or a directory without a model.
    """
    if model is None and not (ASSETS / "config.json").is_file():
        raise ValueError("this installation has no bundled model; name a directory or a hub id")
    name = str(ASSETS) if model is None else model
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{name} has no config.json; pass the directory of a saved model")
        return str(path)
    if path.exists():
        raise ValueError(f"{name} is a file; pass the directory of a saved model or a hub id")
    if _looks_local(name):
        raise ValueError(f"no model directory {name}; pass an existing one or a hub id (owner/name)")
    return name


def _looks_local(name: str) -> bool:
    """A name with a path's shape, or under a directory that exists, is never looked up on the hub."""
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None
    return not is_hub_id or ("/" in name and Path(name.split("/")[0]).is_dir())


def load_config(name: str) -> Any:
    """The config of a decoder-only language model.

    Raises:
        ValueError: no such model, or a model of another kind.
    """
    with _explained(name):
        config = AutoConfig.from_pretrained(name)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{config.model_type} is an encoder-decoder model; bitkv serves decoder-only models"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{config.model_type} is not a causal language model; name one that is")
    return config


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model; ValueError with one sentence if there is none."""
    with _explained(name):
        return AutoTokenizer.from_pretrained(name)


def load_model(name: str, dtype: str = "auto", device: str = "auto") -> Any:
    """The model in evaluation mode, with the attention that Transformers gives it: SDPA where it can.

    Args:
        dtype: one of `bitkv.generation.request.DTYPES`; "auto" is the checkpoint's own.
        device: "auto" (a GPU if there is one) or what `torch.device` takes.

    Raises:
        ValueError: the weights, the dtype or the device cannot be had.
    """
    if dtype not in DTYPES:
        raise ValueError(f"no dtype {dtype!r}; choose from {', '.join(DTYPES)}")
    target = find_device(device)
    with _explained(name):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.to(target).eval()


def find_device(name: str) -> torch.device:
    """The device of this name; ValueError if this machine has no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used ({_sentence(error)}); try cpu") from None
    return device


def context_limit(config: Any) -> int | None:
    """Tokens the model was made for, if its config says so."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def quiet_transformers() -> None:
    """No progress bars or advice from Transformers in this process; errors still raise."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        if os.path.isdir(name):
            raise ValueError(f"cannot load the model in {name}: {_sentence(error)}") from error
        raise ValueError(
            f"cannot load {name!r} from the hub; check the name and the connection, "
            "or pass a local directory"
        ) from error


def _sentence(error: Exception) -> str:
    """The first sentence of a message that may run over many lines."""
    if isinstance(error, json.JSONDecodeError):
        return "a JSON file is damaged"
    first = re.split(r"(?<=[.!?])\s|\n", str(error).strip(), maxsplit=1)[0]
    return first.rstrip(".") or type(error).__name__
