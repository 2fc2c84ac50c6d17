"""`run`: every measurement for a model and a list of recipes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, get_args

from rich.progress import Progress

from bitkv.evaluation.agreement import agreement
from bitkv.evaluation.fidelity import fidelity
from bitkv.evaluation.perplexity import perplexity
from bitkv.evaluation.protocols import (
    Advance,
    Protocol,
    Subject,
    Windows,
    cut,
    ignore,
    model_name,
)
from bitkv.evaluation.recall import MAKERS, RecallProtocol, recall
from bitkv.evaluation.report import Row
from bitkv.recipe import Recipe
from bitkv.recipe_file import as_recipe

_WINDOWED = ("perplexity", "agreement", "fidelity")
TASKS = (*_WINDOWED, *MAKERS)
"""Everything that `run` measures."""


def run(
    model: Any,
    tokenizer: Any,
    recipes: Sequence[Recipe | str],
    *,
    text: str,
    tasks: Sequence[str] = ("perplexity", "agreement", "needle", "fidelity"),
    tokens: int = 8192,
    window: int = 2048,
    samples: int = 50,
    lengths: Sequence[int] = (1024, 4096),
    seed: int = 0,
    perplexity_protocol: Protocol = "packed",
    agreement_protocol: Protocol = "streamed",
    recall_protocol: RecallProtocol = "document first",
    name: str | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Measure what each recipe does to a model, beside the stock cache.

    Args:
        model, tokenizer: a Transformers causal language model and its tokenizer.
        recipes: recipes or their texts.
        text: held-out text: what the model was never trained on.
        tasks: names from `TASKS`.
        tokens, window: held-out tokens, and tokens of a window, for all tasks but recall.
        samples, lengths, seed: recall prompts a length, their lengths in tokens, what draws them.
        perplexity_protocol, agreement_protocol, recall_protocol: see `report.PROTOCOLS`.
        name: the model's name in the rows; by default the end of its path.
        progress: a display to add a bar a measurement to; nothing is shown without one.

    Returns:
        Rows in the order of tasks, lengths and recipes, the stock cache first where it has a row.
        The same arguments give the same rows.

    Raises:
        ValueError: a name that does not exist, or a recipe, context or text that cannot be measured.
    """
    stock = Subject(model, model_name=name or model_name(model))
    bench = _Bench(
        stock=stock,
        subjects=[Subject(model, as_recipe(r), str(r), stock.model_name) for r in recipes],
        tokenizer=tokenizer,
        text=text,
        tasks=tasks,
        tokens=tokens,
        window=window,
        samples=samples,
        lengths=lengths,
        seed=seed,
        perplexity_protocol=perplexity_protocol,
        agreement_protocol=agreement_protocol,
        recall_protocol=recall_protocol,
    )
    jobs = bench.jobs()
    rows: list[Row] = []
    with _attention_restored(model):
        for job in jobs:
            rows += job.measure(advance=_bar(progress, job))
    return rows


class _Job(NamedTuple):
    """A measurement that calls its `advance` `total` times."""

    name: str
    total: int
    measure: Callable[..., list[Row]]


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """The arguments of `run`, checked."""

    stock: Subject
    subjects: Sequence[Subject]
    tokenizer: Any
    text: str
    tasks: Sequence[str]
    tokens: int
    window: int
    samples: int
    lengths: Sequence[int]
    seed: int
    perplexity_protocol: Protocol
    agreement_protocol: Protocol
    recall_protocol: RecallProtocol

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
        for name in ("tokens", "window", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; pass 1 or more")

    def jobs(self) -> list[_Job]:
        """All jobs at once, so that what cannot be measured is refused before anything runs."""
        windows = self._windows() if set(self.tasks) & set(_WINDOWED) else None
        jobs: list[_Job] = []
        for task in self.tasks:
            jobs += self._recall_jobs(task) if task in MAKERS else [self._window_job(windows, task)]
        return jobs

    def _check(self, context: int) -> None:
        for subject in (self.stock, *self.subjects):
            subject.check_context(context)

    def _windows(self) -> Windows:
        self._check(self.window)
        return cut(self.tokenizer, self.text, tokens=self.tokens, window=self.window)

    def _window_job(self, windows: Windows | None, task: str) -> _Job:
        assert windows is not None
        measures: dict[str, Callable[..., list[Row]]] = {
            "perplexity": partial(perplexity, protocol=self.perplexity_protocol),
            "agreement": partial(agreement, protocol=self.agreement_protocol),
            "fidelity": fidelity,
        }
        num_rows = len(self.subjects) + (task == "perplexity")
        measure = partial(measures[task], self.stock, self.subjects, windows)
        return _Job(task, num_rows * len(windows.ids), measure)

    def _recall_jobs(self, task: str) -> Iterator[_Job]:
        for length in self.lengths:
            self._check(length)
            measure = partial(
                recall,
                self.stock,
                self.subjects,
                self.tokenizer,
                self.text,
                task=task,
                length=length,
                samples=self.samples,
                seed=self.seed,
                protocol=self.recall_protocol,
            )
            yield _Job(f"{task} {length}", self.samples * (len(self.subjects) + 1), measure)


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
