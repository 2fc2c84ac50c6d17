"""Recipe files: a recipe and what its codecs have learned, in one safetensors file."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitkv.codecs import Codec
from bitkv.digests import digest_of
from bitkv.files import replacing
from bitkv.recipe.base import Calibration, Recipe
from bitkv.recipe.text import parse

_MAGIC = "bitkv recipe 1"


def write(recipe: Recipe, path: Path) -> None:
    """Write a calibrated recipe, whole or not at all.

    Raises:
        ValueError: it was not calibrated, or there is no folder to write to.
    """
    calibration = recipe.calibration
    if calibration is None:
        raise ValueError(f"recipe {recipe} was not calibrated; its text says everything")
    metadata = {
        "format": _MAGIC,
        "recipe": repr(recipe),
        "layers": str(len(calibration.codecs)),
        "model": calibration.model,
        "weights": calibration.weights,
        "source": calibration.source,
    }
    metadata["digest"] = _digest(metadata, calibration.tensors)
    with replacing(path) as temporary:
        save_file(calibration.tensors, temporary, metadata)


def read(path: Path) -> Recipe:
    """The recipe in a file that `write` wrote.

    Raises:
        ValueError: the file is damaged or none of these.
        FileNotFoundError: there is no such file.
    """
    metadata, tensors = open_tensors(path)
    if metadata.get("format") != _MAGIC:
        raise ValueError(f"{path} is not a recipe file; pass one that `bitkv calibrate` wrote")
    if metadata.pop("digest", None) != _digest(metadata, tensors):
        raise ValueError(f"{path} is damaged: its digest does not match; calibrate again")
    try:
        recipe = parse(metadata["recipe"])
        pairs = [recipe.codecs(i) for i in range(int(metadata["layers"]))]
        codecs = tuple(with_learned(tensors, i, pair) for i, pair in enumerate(pairs))
        calibration = Calibration(codecs, metadata["model"], metadata["weights"], metadata["source"])
    except (KeyError, IndexError) as error:
        raise ValueError(f"{path} is damaged: it lacks {error}; calibrate again") from None
    return recipe.calibrated(calibration)


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Of everything in a recipe file."""
    text = json.dumps(metadata, sort_keys=True) + digest_of(tensors)
    return hashlib.sha256(text.encode()).hexdigest()


def as_recipe(recipe: Recipe | str) -> Recipe:
    """A recipe as it is, or the one that a text or a recipe file (`.safetensors`) names.

    Raises:
        ValueError: it names none, or the file is damaged.
        FileNotFoundError: there is no such file.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe.endswith(".safetensors"):
        return read(Path(recipe))
    return parse(recipe)


def open_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file.

    Raises:
        ValueError: it is damaged.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no recipe file {path}; make one with `bitkv calibrate`")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, tensors
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a recipe file ({error}); calibrate again") from None


def with_learned(
    tensors: Mapping[str, Tensor], layer_idx: int, pair: tuple[Codec, Codec]
) -> tuple[Codec, Codec]:
    """The codecs of a layer with their tensors, named as in `Calibration.tensors`."""
    key, value = (
        codec.with_learned({k.removeprefix(start): x for k, x in tensors.items() if k.startswith(start)})
        for codec, start in zip(pair, (f"{layer_idx}.key.", f"{layer_idx}.value."), strict=True)
    )
    return key, value
