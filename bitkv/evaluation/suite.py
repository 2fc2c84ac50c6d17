"""`run`: every measurement for a model and a list of recipes."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, get_args

from rich.progress import Progress

from bitkv.evaluation.agreement import agreement
from bitkv.evaluation.divergence import divergence, starts
from bitkv.evaluation.fidelity import fidelity
from bitkv.evaluation.perplexity import perplexity
from bitkv.evaluation.prompts import RECALL, lessons, prompts
from bitkv.evaluation.protocols import (
    Advance,
    Protocol,
    Subject,
    Windows,
    cut,
    ignore,
    model_name,
)
from bitkv.evaluation.recall import RecallProtocol, recall, table_copy
from bitkv.evaluation.report import Row
from bitkv.evaluation.stress import stressed
from bitkv.recipe import Recipe
from bitkv.recipe.file import as_recipe

TASKS = ("perplexity", "agreement", "ood", "fidelity", "divergence", *RECALL, "table_copy")
"""Everything that `run` measures."""

Fit = Callable[[Any, Sequence[Recipe]], Sequence[Recipe]]
"""Calibrates recipes for a model."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, on what.

    Args:
        text: held-out text: what the model was never trained on.
        ood_text: text of another domain, for the task `ood`: perplexity and agreement on it.
        tasks: names from `TASKS`.
        tokens, window: tokens of a text that are read, and tokens of a window, for perplexity,
            agreement, `ood` and fidelity.
        samples, lengths: prompts, and their lengths in tokens, for the other tasks.
        seed, seeds: what draws recall prompts; with several seeds, `samples` prompts are drawn of each.
        keys: facts of a recall prompt; None is each task's own number.
        depths: with 2 or more, needles are asked for from so many equal parts of the prompt in turn, and
            rows of each part follow.
        steps: tokens that the task `divergence` generates.
        stress: measure a variant of the model that has outlier channels, see `stressed`.
        num_sink_tokens, recent_tokens: of all recipes alike; None leaves each its own.
        perplexity_protocol, agreement_protocol, recall_protocol: see `report.PROTOCOLS`.

    Raises:
        ValueError: a name that does not exist, or a number that is too small.
    """

    text: str
    ood_text: str | None = None
    tasks: Sequence[str] = ("perplexity", "agreement", "needle", "fidelity")
    tokens: int = 8192
    window: int = 2048
    samples: int = 50
    lengths: Sequence[int] = (1024, 4096)
    seed: int = 0
    seeds: int = 1
    keys: int | None = None
    depths: int = 1
    steps: int = 128
    stress: bool = False
    num_sink_tokens: int | None = None
    recent_tokens: int | None = None
    perplexity_protocol: Protocol = "packed"
    agreement_protocol: Protocol = "streamed"
    recall_protocol: RecallProtocol = "document first"

    def __post_init__(self) -> None:
        for name, values, choices in (
            ("task", self.tasks, TASKS),
            ("perplexity protocol", [self.perplexity_protocol], get_args(Protocol)),
            ("agreement protocol", [self.agreement_protocol], get_args(Protocol)),
            ("recall protocol", [self.recall_protocol], get_args(RecallProtocol)),
        ):
            for value in values:
                if value not in choices:
                    raise ValueError(f"no {name} {value!r}; choose from {', '.join(choices)}")
        for name, least in (("tokens", 1), ("window", 1), ("samples", 1), ("seeds", 1), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; pass {least} or more")
        if self.keys is not None and self.keys < 2:
            raise ValueError(f"keys is {self.keys}; pass 2 or more")
        if not 1 <= self.depths <= self.samples:
            raise ValueError(
                f"depths is {self.depths}, with {self.samples} samples a seed; pass 1 to {self.samples}"
            )
        if "ood" in self.tasks and self.ood_text is None:
            raise ValueError("the task ood needs a text of another domain; pass ood_text")


def run(
    model: Any,
    tokenizer: Any,
    recipes: Sequence[Recipe | str],
    options: Options,
    *,
    name: str | None = None,
    fit: Fit | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Measure what each recipe does to a model, beside the stock cache.

    Args:
        model, tokenizer: a Transformers causal language model and its tokenizer.
        recipes: recipes or their texts.
        options: what to measure.
        name: the model's name in the rows; by default the end of its path.
        fit: calibrates recipes that learn for the model that is measured.
        progress: a display to add a bar a measurement to; nothing is shown without one.

    Returns:
        Rows in the order of tasks, lengths and recipes, the stock cache first where it has a row.
        The same arguments give the same rows.

    Raises:
        ValueError: a recipe, context or text that cannot be measured.
    """
    name = name or model_name(model)
    if options.stress:
        model, name = stressed(model), f"{name}+stress"
    made = _made(recipes, model, options, fit)
    subjects = [Subject(model, r, str(text), name) for r, text in zip(made, recipes, strict=True)]
    bench = _Bench(Subject(model, model_name=name), subjects, tokenizer, options)
    jobs = bench.jobs()
    rows: list[Row] = []
    with _attention_restored(model):
        for job in jobs:
            rows += job.measure(advance=_bar(progress, job))
    return rows


def _made(
    recipes: Sequence[Recipe | str], model: Any, options: Options, fit: Fit | None
) -> list[Recipe]:
    """Recipes with the windows that all shall have, and with what they have to learn."""
    windows = {name: getattr(options, name) for name in ("num_sink_tokens", "recent_tokens")}
    changed: dict[str, Any] = {name: value for name, value in windows.items() if value is not None}
    made = [replace(as_recipe(recipe), **changed) for recipe in recipes]
    learners = [i for i, recipe in enumerate(made) if recipe.learns]
    if fit is not None and learners:
        for i, fitted in zip(learners, fit(model, [made[i] for i in learners]), strict=True):
            made[i] = fitted
    return made


class _Job(NamedTuple):
    """A measurement that calls its `advance` `total` times."""

    name: str
    total: int
    measure: Callable[..., list[Row]]


@dataclass(frozen=True)
class _Bench:
    stock: Subject
    subjects: Sequence[Subject]
    tokenizer: Any
    options: Options

    def jobs(self) -> list[_Job]:
        """All jobs at once, so that what cannot be measured is refused before anything runs."""
        return [job for task in self.options.tasks for job in self._of(task)]

    def _of(self, task: str) -> Iterator[_Job]:
        if task == "ood":
            assert self.options.ood_text is not None
            windows = self._windows(self.options.ood_text)
            for measured in ("perplexity", "agreement"):
                yield self._window_job(measured, windows, "ood ")
        elif task in ("perplexity", "agreement", "fidelity"):
            yield self._window_job(task, self._windows(self.options.text))
        else:
            for length in self.options.lengths:
                yield self._length_job(task, length)

    def _check(self, context: int) -> None:
        for subject in (self.stock, *self.subjects):
            subject.check_context(context)

    def _windows(self, text: str) -> Windows:
        self._check(self.options.window)
        return cut(self.tokenizer, text, tokens=self.options.tokens, window=self.options.window)

    def _window_job(self, task: str, windows: Windows, prefix: str = "") -> _Job:
        measures: dict[str, Callable[..., list[Row]]] = {
            "perplexity": partial(perplexity, protocol=self.options.perplexity_protocol),
            "agreement": partial(agreement, protocol=self.options.agreement_protocol),
            "fidelity": fidelity,
        }
        num_rows = len(self.subjects) + (task == "perplexity")

        def measure(advance: Advance) -> list[Row]:
            rows = measures[task](self.stock, self.subjects, windows, advance=advance)
            return [dataclasses.replace(row, task=prefix + row.task) for row in rows]

        return _Job(prefix + task, num_rows * len(windows.ids), measure)

    def _length_job(self, task: str, length: int) -> _Job:
        """A job on prompts of a length; the first prompt is made, to see that they can be."""
        self._check(length)
        if task == "divergence":
            return self._divergence_job(length)
        options = self.options
        size: dict[str, Any] = {"length": length, "samples": options.samples, "keys": options.keys}
        source = (self.tokenizer, options.text)
        seeds: dict[str, Any] = {"seed": options.seed, "seeds": options.seeds}
        if task == "table_copy":
            next(lessons(*source, **size, seed=options.seed))
        else:
            size |= {"task": task, "depths": options.depths if RECALL[task].has_depth else 1}
            next(prompts(*source, **size, seed=options.seed))
        total = options.samples * options.seeds * (len(self.subjects) + 1)
        measure = partial(self._on_prompts(task), self.stock, self.subjects, *source, **size, **seeds)
        return _Job(f"{task} {length}", total, measure)

    def _on_prompts(self, task: str) -> Callable[..., list[Row]]:
        if task == "table_copy":
            return table_copy
        return partial(recall, protocol=self.options.recall_protocol)

    def _divergence_job(self, length: int) -> _Job:
        options, read = self.options, length - self.options.steps
        if read < 2:
            raise ValueError(
                f"{options.steps} steps leave no prompt in a length of {length}; pass fewer steps"
            )
        self._check(read)
        next(starts(self.tokenizer, options.text, length=read, samples=1))
        measure = partial(
            divergence,
            self.stock,
            self.subjects,
            self.tokenizer,
            options.text,
            length=length,
            samples=options.samples,
            steps=options.steps,
        )
        return _Job(f"divergence {length}", options.samples * (len(self.subjects) + 1), measure)


def _bar(progress: Progress | None, job: _Job) -> Advance:
    if progress is None:
        return ignore
    return partial(progress.advance, progress.add_task(job.name, total=job.total))


@contextmanager
def _attention_restored(model: Any) -> Iterator[None]:
    """Packed caches switch a model's attention; leave it as it was."""
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    try:
        yield
    finally:
        config._attn_implementation = before
