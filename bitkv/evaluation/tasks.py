"""Generated recall tasks: the prompts that both training and evaluation use.

Every task is a plain-text prompt whose continuation is known.  A model answers a sample when the
text it generates, stripped of leading blanks, starts with ``Sample.answer``.  Nothing here depends
on a model: lengths are measured by the ``count_tokens`` function of the caller, and all randomness
comes from the ``random.Random`` that is passed in.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

CountTokens = Callable[[str], int]

#: Digits in every value.
VALUE_DIGITS = 5

#: Names that facts are told about.
KEYS: tuple[str, ...] = tuple(
    """
    acorn amber anchor apple arrow aspen atlas aurora autumn badger bamboo banjo barley basil beacon
    beaver berry birch bishop blossom bolt bottle branch brass breeze brick bridge bronze brook bucket
    butter button cabin cactus camel candle canoe canyon carbon castle cedar cello chalk cherry chess
    cider cinder citrus cliff clover cobalt cobra comet copper coral cotton cougar coyote cradle crane
    crater cricket crown crystal curry cypress dagger dahlia daisy dawn delta desert diamond dolphin
    dragon drum dusk eagle ebony echo elder elk ember emerald engine falcon feather fern fiddle fig
    finch flame flint forest fossil fox frost galaxy garden garlic garnet gecko geyser ginger glacier
    glove goblin gold goose grape granite gravel grove guitar gull hammer harbor harp harvest hawk
    hazel heron hickory honey hornet hunter indigo iris iron island ivory ivy jacket jade jaguar
    jasmine jasper jewel jungle juniper kayak kettle kiwi knight ladder lagoon lantern larch laurel
    lava lemon leopard lily lime linen lion lizard llama lotus lynx magnet mango maple marble marsh
    meadow melon mercury meteor mint mirror moose mosaic moss nectar needle nickel north nutmeg oak
    oasis ocean olive onion onyx opal orbit orchid osprey otter oyster palm panda panther paper pearl
    pebble pecan pepper pigeon pilot pine piano plum polar pollen pony poplar prairie prism pumpkin
    puma quail quartz rabbit rain raven reef ribbon river robin rocket rose ruby saddle saffron sage
    salmon sand sapphire scarlet shadow shell silver sparrow spice spider spruce squid star stone
    storm summer sunset swan temple thistle thunder tiger timber topaz torch tulip tundra turtle
    valley velvet violet walnut willow winter wolf yarrow zebra zephyr zinc
    """.split()
)


@dataclass(frozen=True)
class Sample:
    """A prompt and the text that should follow it (after blanks)."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Retelling:
    """A document, and frames of what was told in it, each with the value that should follow it."""

    document: str
    parts: tuple[tuple[str, str], ...]


def random_value(rng: random.Random) -> str:
    """A number of ``VALUE_DIGITS`` random digits."""
    return "".join(rng.choice("0123456789") for _ in range(VALUE_DIGITS))


def random_values(rng: random.Random, count: int, distinct_starts: bool = True) -> list[str]:
    """``count`` random values; with ``distinct_starts`` no two (of up to ten) begin alike.

    Values that begin alike are much harder for a small model: after the first digit it may go on
    with the wrong one.
    """
    values = [random_value(rng) for _ in range(count)]
    if distinct_starts and count <= 10:
        firsts = rng.sample("0123456789", count)
        values = [first + value[1:] for first, value in zip(firsts, values, strict=True)]
    return values


def similar_values(rng: random.Random, count: int) -> list[str]:
    """``count`` random values, many of which begin like another one: every digit takes a look-up."""
    values: list[str] = []
    for _ in range(count):
        value = random_value(rng)
        if values and rng.random() < 0.6:
            shared = rng.choice((1, 1, 2, 3))
            value = rng.choice(values)[:shared] + value[shared:]
        values.append(value)
    return values


def similar_keys(rng: random.Random, count: int) -> list[str]:
    """``count`` different keys of two words, in families that have the first word in common."""
    size = max(2, math.isqrt(count))
    families = rng.sample(KEYS, -(-count // size))
    others = [key for key in KEYS if key not in families]
    keys = [f"{name} {word}" for name in families for word in rng.sample(others, size)]
    rng.shuffle(keys)
    return keys[:count]


def needle_question(key: str) -> str:
    """The text whose continuation is the code of ``key``."""
    return f"The access code of {key} is"


def needle_sentence(key: str, value: str) -> str:
    """The sentence that tells the code of ``key``."""
    return f"{needle_question(key)} {value}."


def pair_question(key: str) -> str:
    """The beginning of a key-value line."""
    return f"- {key}"


def pair_line(key: str, value: str) -> str:
    """One line of a key-value table."""
    return f"{pair_question(key)} {value}"


def variable_question(name: str) -> str:
    """The text whose continuation is the number that variable ``name`` holds."""
    return f"The value of {name} is"


def assignment(name: str, source: str) -> str:
    """One assignment of a number or of another variable."""
    return f"let {name} = {source}"


#: Lines around a passage that is repeated.
COPY_OPEN = "Passage:"
COPY_AGAIN = "Passage again:"


def _filler_lines(
    rng: random.Random, filler: str, target_tokens: int, count_tokens: CountTokens
) -> list[str]:
    """Whole consecutive lines of ``filler``, from a random start, of at most ``target_tokens``."""
    lines = filler.splitlines(keepends=True)
    if not lines:
        return []
    start = rng.randrange(len(lines))
    chosen: list[str] = []
    used = 0
    index = start
    while True:
        cost = count_tokens(lines[index % len(lines)])
        if used + cost > target_tokens:
            return chosen
        chosen.append(lines[index % len(lines)])
        used += cost
        index += 1


Depth = tuple[float, float]
"""A range of places in a document, from 0.0 (its beginning) to 1.0 (its end)."""


def _spread(rng: random.Random, lines: Sequence[str], facts: Sequence[str]) -> str:
    """``lines`` with ``facts`` put on lines of their own at random places, in their order."""
    return _put(lines, facts, sorted(rng.randrange(len(lines) + 1) for _ in facts))


def _spread_around(
    rng: random.Random, lines: Sequence[str], facts: Sequence[str], asked: int, depth: Depth
) -> str:
    """As ``_spread``, but fact ``asked`` comes at a random place of ``depth`` and order is free."""
    places = [rng.randrange(len(lines) + 1) for _ in facts]
    places[asked] = round(rng.uniform(*depth) * len(lines))
    pairs = sorted(zip(places, facts, strict=True))
    return _put(lines, [fact for _, fact in pairs], [place for place, _ in pairs])


def _put(lines: Sequence[str], facts: Sequence[str], places: Sequence[int]) -> str:
    """``lines`` with ``facts`` before those of ascending ``places``."""
    out: list[str] = []
    done = 0
    for index, line in enumerate(lines):
        while done < len(places) and places[done] <= index:
            out.append(facts[done] + "\n")
            done += 1
        out.append(line if line.endswith("\n") else line + "\n")
    out.extend(fact + "\n" for fact in facts[done:])
    return "".join(out)


def _in_filler(
    rng: random.Random,
    filler: str,
    facts: Sequence[str],
    question: str,
    target_tokens: int,
    count_tokens: CountTokens,
) -> str:
    """Filler with facts in it and the question at its end, of at most ``target_tokens``."""
    own = count_tokens("".join(fact + "\n" for fact in facts) + question)
    lines = _filler_lines(rng, filler, max(0, target_tokens - own - 2), count_tokens)
    return _spread(rng, lines, facts) + question


def needle(
    rng: random.Random,
    filler: str,
    num_keys: int,
    target_tokens: int,
    count_tokens: CountTokens,
    distinct_starts: bool = True,
    depth: Depth | None = None,
) -> Sample:
    """``num_keys`` coded sentences spread through ``filler``; one of them is asked at the end."""
    keys = rng.sample(KEYS, num_keys)
    values = random_values(rng, num_keys, distinct_starts)
    return _needle_of(rng, filler, keys, values, target_tokens, count_tokens, depth)


def needle_similar(
    rng: random.Random,
    filler: str,
    num_keys: int,
    target_tokens: int,
    count_tokens: CountTokens,
    depth: Depth | None = None,
) -> Sample:
    """As ``needle`` among near duplicates: keys share a word with others, values their first digits."""
    keys, values = similar_keys(rng, num_keys), similar_values(rng, num_keys)
    return _needle_of(rng, filler, keys, values, target_tokens, count_tokens, depth)


def _needle_of(
    rng: random.Random,
    filler: str,
    keys: Sequence[str],
    values: Sequence[str],
    target_tokens: int,
    count_tokens: CountTokens,
    depth: Depth | None,
) -> Sample:
    facts = [needle_sentence(key, value) for key, value in zip(keys, values, strict=True)]
    asked = rng.randrange(len(keys))
    question = needle_question(keys[asked])
    if depth is None:
        prompt = _in_filler(rng, filler, facts, question, target_tokens, count_tokens)
        return Sample(prompt, values[asked])
    own = count_tokens("".join(fact + "\n" for fact in facts) + question)
    lines = _filler_lines(rng, filler, max(0, target_tokens - own - 2), count_tokens)
    return Sample(_spread_around(rng, lines, facts, asked, depth) + question, values[asked])


def key_value_recall(
    rng: random.Random,
    filler: str,
    num_keys: int,
    target_tokens: int,
    count_tokens: CountTokens,
    distinct_starts: bool = True,
) -> Sample:
    """A table of ``num_keys`` pairs, then ``filler``, then one key to look up."""
    keys = rng.sample(KEYS, num_keys)
    values = random_values(rng, num_keys, distinct_starts)
    asked = rng.randrange(num_keys)
    table = "".join(pair_line(k, v) + "\n" for k, v in zip(keys, values, strict=True))
    question = pair_question(keys[asked])
    own = count_tokens(table + question)
    lines = _filler_lines(rng, filler, max(0, target_tokens - own - 2), count_tokens)
    return Sample(table + "".join(lines) + question, values[asked])


def table_copy(
    rng: random.Random,
    filler: str,
    num_keys: int,
    target_tokens: int,
    count_tokens: CountTokens,
) -> Retelling:
    """A table of ``num_keys`` pairs, then ``filler``; the table is to be told again, line by line."""
    keys, values = rng.sample(KEYS, num_keys), random_values(rng, num_keys, distinct_starts=False)
    told = [pair_line(key, value) + "\n" for key, value in zip(keys, values, strict=True)]
    table = "".join(told)
    lines = _filler_lines(rng, filler, max(0, target_tokens - 2 * count_tokens(table) - 2), count_tokens)
    frames = [pair_question(keys[0]), *("\n" + pair_question(key) for key in keys[1:])]
    return Retelling(table + "".join(lines), tuple(zip(frames, values, strict=True)))


def variable_tracking(
    rng: random.Random,
    filler: str,
    hops: int,
    chains: int,
    target_tokens: int,
    count_tokens: CountTokens,
) -> Sample:
    """``chains`` chains of ``hops`` assignments mixed in ``filler``; the end of one is asked."""
    names = iter(rng.sample(KEYS, chains * (hops + 1)))
    queues: list[list[str]] = []
    ends: list[tuple[str, str]] = []
    for value in random_values(rng, chains):
        name = next(names)
        queue = [assignment(name, value)]
        for _ in range(hops):
            previous, name = name, next(names)
            queue.append(assignment(name, previous))
        queues.append(queue)
        ends.append((name, value))
    facts: list[str] = []
    while any(queues):
        facts.append(rng.choice([queue for queue in queues if queue]).pop(0))
    name, value = rng.choice(ends)
    question = variable_question(name)
    return Sample(_in_filler(rng, filler, facts, question, target_tokens, count_tokens), value)


def long_copy(
    rng: random.Random,
    filler: str,
    passage_tokens: int,
    answer_tokens: int,
    target_tokens: int,
    count_tokens: CountTokens,
) -> Sample:
    """A passage, filler, and the first half of the passage again; the answer is how it goes on."""
    lines: list[str] = []
    while len(lines) < 2:
        lines = [x for x in _filler_lines(rng, filler, passage_tokens, count_tokens) if x.strip()]
    half = len(lines) // 2
    answer = ""
    for word in "".join(lines[half:]).split(" "):
        longer = f"{answer} {word}".lstrip(" ")
        if answer.strip() and count_tokens(longer) > answer_tokens:
            break
        answer = longer
    first = f"{COPY_OPEN}\n{''.join(lines)}\n"
    again = f"{COPY_AGAIN}\n{''.join(lines[:half])}"
    own = count_tokens(first + again)
    between = _filler_lines(rng, filler, max(0, target_tokens - own - 2), count_tokens)
    return Sample(first + "".join(between) + again, answer.strip())
