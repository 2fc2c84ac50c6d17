"""What every benchmark is asked for, checked before anything is measured."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from bitkv.benchmark.bandwidth import read_bandwidth
from bitkv.benchmark.environment import Environment, environment_of_run
from bitkv.benchmark.timing import QUICK, Effort, torch_threads
from bitkv.recipe import Recipe
from bitkv.recipe.file import as_recipe

Progress = Callable[[str, int, int], None]
"""Called before each step with what it measures, how many steps are done, and how many there are."""


def silent(label: str, done: int, total: int) -> None:
    """Progress that nobody sees."""


def name_recipes(recipes: Sequence[Recipe | str]) -> dict[str, Recipe]:
    """Recipes by what results call them.

    Raises:
        ValueError: a text that names no recipe.
    """
    return {r if isinstance(r, str) else str(r): as_recipe(r) for r in recipes}


def check_contexts(contexts: Sequence[int]) -> list[int]:
    """Contexts without repetitions.

    Raises:
        ValueError: one below 1.
    """
    for context in contexts:
        if context < 1:
            raise ValueError(f"a context of {context} tokens is too short; pass 1 or more")
    return list(dict.fromkeys(contexts))


def measure_environments(threads: Sequence[int], effort: Effort, command: str) -> list[Environment]:
    """One for each number of threads, torch's present one by default, with its read bandwidth."""
    environments = []
    for count in dict.fromkeys(threads or [torch.get_num_threads()]):
        with torch_threads(count):
            rates = read_bandwidth(effort), read_bandwidth(effort, huge_pages=True)
            environments.append(environment_of_run(*rates, command))
    return environments


def measure_beside_bandwidth(
    environment: Environment, measure: Callable[[], float]
) -> tuple[Environment, float]:
    """What `measure` gives with the environment's threads, and that with the bandwidth around it.

    On a host with other tenants bandwidth changes within minutes: a fraction of what was read at the
    start of the run would tell of them. The faster of the rates just before and just after counts.
    """
    with torch_threads(environment.threads):
        before = read_bandwidth(QUICK)
        measured = measure()
        rate = max(before, read_bandwidth(QUICK))
    return replace(environment, bandwidth_gbps=rate), measured
