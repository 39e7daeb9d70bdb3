"""The embedded tasks: five domains, four levels, and a worked response to each problem.

A problem is a pure function of (domain, level, split, seed, index). Splits cannot overlap: the
hash of a question decides whether it belongs to "train" or to "validation", and a draw that falls
on the wrong side is drawn again. The level "beyond" is never trained on: it is the held-out level.

Each problem carries `work(slips)`, the response a careful pupil would write, step by step between
`<think>` and `</think>`. With a slip rate above zero some steps go wrong and the later ones follow
from them: that is how the embedded base model was taught to be promising and unreliable.
"""

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from prolong_jax.config import DOMAINS, LEVELS
from prolong_jax.data.prompts import Prompt

HELD_OUT_LEVEL = "beyond"
SPLITS = ("train", "validation")
VALIDATION_SHARE = 8  # one question in so many belongs to the validation split


class Slips:
    """Decides where a worked response goes wrong. `rate` is the chance per step, in [0, 1]."""

    def __init__(self, rng: random.Random, rate: float):
        self.rng, self.rate = rng, rate

    def happens(self) -> bool:
        return self.rng.random() < self.rate

    def number(self, value: int) -> int:
        """`value`, or a nearby wrong number that is not negative."""
        if not self.happens():
            return value
        return self.rng.choice([v for v in range(value - 3, value + 4) if v >= 0 and v != value])

    def one_of(self, right: Any, options: list) -> Any:
        """`right`, or another one of the options."""
        return self.rng.choice([o for o in options if o != right]) if self.happens() else right


class CountedSlips(Slips):
    """Never slips, and counts the steps at which it could have."""

    def __init__(self, rng: random.Random):
        super().__init__(rng, 0.0)
        self.count = 0

    def happens(self) -> bool:
        self.count += 1
        return False


@dataclass(frozen=True)
class Problem:
    question: str
    reference: Mapping[str, Any]
    work: Callable[[Slips], str]  # the response after the opening <think>, up to the stop token


def _response(steps: list[str], answer: str) -> str:
    return " ".join(steps) + "</think>" + answer


# --- column arithmetic, shared by math and STEM ------------------------------------------------


def _digits(n: int) -> list[int]:
    """Decimal digits, units first."""
    return [int(d) for d in reversed(str(n))]


def _with_digits(rng: random.Random, count: int) -> int:
    return rng.randrange(10 ** (count - 1), 10**count)


def _add(a: int, b: int, slips: Slips) -> tuple[list[str], int]:
    steps, written, carry = [], [], 0
    for i in range(len(str(a))):
        x, y = _digits(a)[i], (_digits(b) + [0] * 9)[i]
        total = slips.number(x + y + carry)
        steps.append(f"{x}+{y}+{carry}={total}")
        written.append(total % 10)
        carry = total // 10
    return steps, sum(d * 10**i for i, d in enumerate([*written, carry]))


def _subtract(a: int, b: int, slips: Slips) -> tuple[list[str], int]:
    steps, written, borrow = [], [], 0
    for i in range(len(str(a))):
        x, y = _digits(a)[i], (_digits(b) + [0] * 9)[i]
        difference = slips.number((x - y - borrow) % 10) % 10
        steps.append(f"{x}-{y}-{borrow}={difference}")
        written.append(difference)
        borrow = int(x - y - borrow < 0)
    return steps, sum(d * 10**i for i, d in enumerate(written))


def _multiply(a: int, digit: int, slips: Slips) -> tuple[list[str], int]:
    steps, written, carry = [], [], 0
    for x in _digits(a):
        total = slips.number(x * digit + carry)
        steps.append(f"{x}*{digit}+{carry}={total}")
        written.append(total % 10)
        carry = total // 10
    return steps, carry * 10 ** len(written) + sum(d * 10**i for i, d in enumerate(written))


# --- math --------------------------------------------------------------------------------------

_MATH_DIGITS = {"easy": (1, 2), "middle": (3, 3), "hard": (5, 5), "beyond": (6, 6)}


def _math(rng: random.Random, level: str) -> Problem:
    count = rng.randint(*_MATH_DIGITS[level])
    kind = rng.choice("+-*")
    a = _with_digits(rng, max(count, 2) if kind == "*" else count)
    b = rng.randint(2, 9) if kind == "*" else _with_digits(rng, max(1, count - rng.randint(0, 1)))
    a, b = (a, b) if kind == "*" else (max(a, b), min(a, b))
    column = {"+": _add, "-": _subtract, "*": _multiply}[kind]
    answer = {"+": a + b, "-": a - b, "*": a * b}[kind]

    def work(slips: Slips) -> str:
        steps, result = column(a, b, slips)
        return _response(steps, rf"\boxed{{{result}}}")

    question = rf"Compute {a} {kind} {b}. Answer in \boxed{{}}."
    return Problem(question, {"answer": str(answer)}, work)


# --- code --------------------------------------------------------------------------------------

# name: (description, note in the trace, statement that rewrites x, the same as a function)
_OPERATIONS: dict[str, tuple[str, str, str, Callable[[int, int], int]]] = {
    "add": ("add {k}", "+{k}", "x += {k}", lambda x, k: x + k),
    "subtract": ("subtract {k}", "-{k}", "x -= {k}", lambda x, k: x - k),
    "multiply": ("multiply by {k}", "*{k}", "x *= {k}", lambda x, k: x * k),
    "remainder": ("take the remainder by {k}", "%{k}", "x %= {k}", lambda x, k: x % k),
    "maximum": ("take the maximum with {k}", "max {k}", "x = max(x, {k})", lambda x, k: max(x, k)),
    "minimum": ("take the minimum with {k}", "min {k}", "x = min(x, {k})", lambda x, k: min(x, k)),
    "negate": ("negate", "neg", "x = -x", lambda x, k: -x),
    "absolute": ("take the absolute value", "abs", "x = abs(x)", lambda x, k: abs(x)),
}
_CODE_STEPS = {"easy": (1, 2), "middle": (3, 4), "hard": (6, 6), "beyond": (7, 7)}


def _code(rng: random.Random, level: str) -> Problem:
    chain: list[tuple[str, int]] = []
    for _ in range(rng.randint(*_CODE_STEPS[level])):
        name = rng.choice([n for n in _OPERATIONS if not chain or n != chain[-1][0]])
        chain.append((name, rng.randint(2, 9 if name in ("multiply", "remainder") else 19)))

    def run(x: int) -> int:
        for name, k in chain:
            x = _OPERATIONS[name][3](x, k)
        return x

    inputs = rng.sample(range(-30, 31), 6)

    def work(slips: Slips) -> str:
        done = [(slips.one_of(name, list(_OPERATIONS)), k) for name, k in chain]
        notes = [_OPERATIONS[name][1].format(k=k) for name, k in done]
        statements = [_OPERATIONS[name][2].format(k=k) for name, k in done]
        code = "; ".join([*statements, "return x"])
        return _response(notes, f"```python\ndef f(x): {code}\n```")

    told = ", ".join(_OPERATIONS[name][0].format(k=k) for name, k in chain)
    if level == HELD_OUT_LEVEL and len(told) > 140:  # more than 64 tokens as a prompt
        return _code(rng, level)
    reference = {
        "inputs": [[x] for x in inputs],
        "outputs": [run(x) for x in inputs],
        "fn_name": "f",
    }
    return Problem(f"Write f(x) in Python: {told}. Answer in ```python.", reference, work)


# --- STEM --------------------------------------------------------------------------------------

# quantity: (first factor, its unit, second factor, its unit, unit of the product)
_FORMULAS = {
    "force": ("mass", "kg", "acceleration", "m/s^2", "N"),
    "distance": ("speed", "m/s", "time", "s", "m"),
    "voltage": ("current", "A", "resistance", "ohm", "V"),
    "energy": ("power", "W", "time", "s", "J"),
    "charge": ("current", "A", "time", "s", "C"),
    "mass": ("density", "kg/m^3", "volume", "m^3", "kg"),
    "power": ("voltage", "V", "current", "A", "W"),
}
_UNITS = [formula[4] for formula in _FORMULAS.values()]
_STEM_DIGITS = {"easy": (1, 1), "middle": (2, 2), "hard": (4, 5), "beyond": (6, 6)}


def _quantity(rng: random.Random, level: str) -> Problem:
    name = rng.choice(list(_FORMULAS))
    first, first_unit, second, second_unit, unit = _FORMULAS[name]
    a = max(2, _with_digits(rng, rng.randint(*_STEM_DIGITS[level])))
    b = rng.randint(2, 9)

    def work(slips: Slips) -> str:
        steps, result = _multiply(a, b, slips)
        unit_told = slips.one_of(unit, _UNITS)
        return _response([f"{name} in {unit_told}", *steps], rf"\boxed{{{result} {unit_told}}}")

    question = (
        f"The {first} is {a} {first_unit} and the {second} is {b} {second_unit}. "
        rf"What is the {name}? Answer in \boxed{{}}."
    )
    # Whole numbers: the usual tolerance would pay for a wrong last digit.
    return Problem(question, {"answer": f"{a * b} {unit}", "rel_tol": 1e-9}, work)


def _choice(rng: random.Random, level: str) -> Problem:
    name = rng.choice(list(_FORMULAS))
    by_unit = level == "easy"  # else by formula

    def told(quantity: str) -> str:
        first, _, second, _, unit = _FORMULAS[quantity]
        return unit if by_unit else f"{first} * {second}"

    others = [told(n) for n in _FORMULAS if n != name]
    options = rng.sample(others, 3) + [told(name)]
    rng.shuffle(options)
    letters = dict(zip(options, "ABCD", strict=True))

    def work(slips: Slips) -> str:
        option = slips.one_of(told(name), options)
        return _response([f"{name} is {option}"], rf"\boxed{{{letters[option]}}}")

    listed = " ".join(f"{letter}) {option}" for option, letter in letters.items())
    asked = "Which unit has" if by_unit else "Which product is"
    question = rf"{asked} the {name}? {listed} Answer with a letter in \boxed{{}}."
    reference = {"answer": letters[told(name)], "options": options}
    return Problem(question, reference, work)


def _stem(rng: random.Random, level: str) -> Problem:
    guessable = level in ("easy", "middle") and rng.random() < 0.4
    return _choice(rng, level) if guessable else _quantity(rng, level)


# --- logic: real reasoning_gym tasks at small settings -----------------------------------------

_LOGIC_SETTINGS: dict[str, dict[str, dict[str, int]]] = {
    "number_filtering": {
        "easy": {"min_numbers": 2, "max_numbers": 2},
        "middle": {"min_numbers": 3, "max_numbers": 3},
        "hard": {"min_numbers": 5, "max_numbers": 6},
        "beyond": {"min_numbers": 7, "max_numbers": 7},
    },
    "count_bits": {
        "easy": {"min_n": 2, "max_n": 31},
        "middle": {"min_n": 32, "max_n": 127},
        "hard": {"min_n": 2**8, "max_n": 2**10 - 1},
        "beyond": {"min_n": 2**10, "max_n": 2**12 - 1},
    },
    "chain_sum": {
        "easy": {"min_terms": 2, "max_terms": 2},
        "middle": {"min_terms": 3, "max_terms": 3},
        "hard": {"min_terms": 6, "max_terms": 7},
        "beyond": {"min_terms": 8, "max_terms": 9},
    },
}
_LOGIC_FIXED: dict[str, dict[str, int]] = {
    "number_filtering": {"min_decimals": 0, "max_decimals": 0, "min_value": 0, "max_value": 99},
    "chain_sum": {"min_digits": 1, "max_digits": 1},
}
_LOGIC_SIZE = 1_000_000_000


@cache
def _dataset(task: str, level: str):
    import reasoning_gym  # heavy, and needed by this domain alone

    settings = _LOGIC_SETTINGS[task][level] | _LOGIC_FIXED.get(task, {})
    return reasoning_gym.create_dataset(task, size=_LOGIC_SIZE, seed=0, **settings)


def _quoted_items(text: str) -> list[str]:
    """The quoted items of a Python list literal."""
    return [part.strip(" '\"") for part in text.strip("[]").split(",") if part.strip()]


def _number_filtering(item: dict, slips: Slips) -> tuple[list[str], str]:
    kept = [float(n) for n in _quoted_items(item["answer"])]
    steps, answer = [], []
    for told in item["metadata"]["original_numbers"]:
        keep = slips.one_of(float(told) in kept, [True, False])
        steps.append(f"{told} {'yes' if keep else 'no'}")
        answer += [told] if keep else []
    return steps, str(answer)


def _count_bits(item: dict, slips: Slips) -> tuple[list[str], str]:
    steps, n, count = [], item["metadata"]["number"], 0
    while n:
        bit = slips.one_of(n % 2, [0, 1])
        count += bit
        steps.append(f"{n} {bit} {count}")
        n //= 2
    return steps, str(count)


def _chain_sum(item: dict, slips: Slips) -> tuple[list[str], str]:
    terms = item["metadata"]["expression"].split()
    total, steps = int(terms[0]), []
    for sign, term in zip(terms[1::2], terms[2::2], strict=True):
        after = total + (int(term) if sign == "+" else -int(term))
        after += slips.rng.choice((-2, -1, 1, 2)) if slips.happens() else 0
        steps.append(f"{total}{sign}{term}={after}")
        total = after
    return steps, str(total)


_LOGIC_WORK = {
    "number_filtering": _number_filtering,
    "count_bits": _count_bits,
    "chain_sum": _chain_sum,
}


def _logic(rng: random.Random, level: str) -> Problem:
    task = rng.choice(list(_LOGIC_SETTINGS))
    item = _dataset(task, level)[rng.randrange(_LOGIC_SIZE)]

    def work(slips: Slips) -> str:
        steps, answer = _LOGIC_WORK[task](item, slips)
        return _response(steps, f"<answer>{answer}</answer>")

    question = f"{item['question'].strip()} Answer in <answer>."
    return Problem(question, {"task": task, "entry": item}, work)


# --- instruction following: IFEval constraints, combined ---------------------------------------

_TOPICS = ("the sea", "a train", "the moon", "a garden", "an old house", "the rain", "a dog")
_WORDS = ("river", "stone", "light", "music", "paper", "winter", "bridge", "silver", "apple")
_ENDINGS = ("That is all.", "The end.", "Thank you.", "See you soon.")
_LISTED = ("It is big.", "It is old.", "It is quiet.", "It is near.", "It is good.")
_INSTRUCT_COUNT = {"easy": (1, 1), "middle": (2, 2), "hard": (4, 4), "beyond": (5, 5)}
_CONSTRAINTS: dict[str, tuple[str, str]] = {  # id: (what the prompt says, what the plan says)
    "punctuation:no_comma": ("Use no commas.", "no comma"),
    "keywords:existence": ("Use the words {0} and {1}.", "words {0} {1}"),
    "startend:end_checker": ('End with "{0}"', "end {0}"),
    "startend:quotation": ("Put all of it in double quotes.", "quotes"),
    "detectable_format:number_bullet_lists": ("Use exactly {0} bullet points.", "bullets {0}"),
    "detectable_format:title": ("Give it a title in << >>.", "title"),
    "keywords:forbidden_words": ("Avoid the word {0}.", "avoid {0}"),
    "detectable_content:postscript": ("Add a postscript with P.S.", "postscript"),
}
_CONFLICTS = ({"startend:end_checker", "detectable_content:postscript"},)


def _constraint(rng: random.Random, name: str) -> tuple[dict[str, Any], tuple]:
    """The keyword arguments of the checker, and the values that the prompt names."""
    if name == "keywords:existence":
        words = rng.sample(_WORDS, 2)
        return {"keywords": words}, tuple(words)
    if name == "keywords:forbidden_words":
        word = rng.choice(["very", "calm", "many"])
        return {"forbidden_words": [word]}, (word,)
    if name == "startend:end_checker":
        phrase = rng.choice(_ENDINGS)
        return {"end_phrase": phrase}, (phrase,)
    if name == "detectable_format:number_bullet_lists":
        count = rng.randint(2, 4)
        return {"num_bullets": count}, (count,)
    if name == "detectable_content:postscript":
        return {"postscript_marker": "P.S."}, ()
    return {}, ()


def _compose(topic: str, kept: dict[str, tuple]) -> str:
    """A short text on the topic that keeps the given constraints and breaks the others."""
    avoided = kept.get("keywords:forbidden_words", ())
    traits = [w for w in ("very", "calm", "many") if w not in avoided]
    comma = "" if "punctuation:no_comma" in kept else ","
    named = kept.get("keywords:existence", ("day", "night"))
    parts = [f"I like {topic}{comma} the {named[0]} and the {named[1]}."]
    parts.append(f"Words like {' '.join(traits)} fit.")
    text = " ".join(parts)
    if "detectable_format:title" in kept:
        text = f"<<{topic.title()}>>\n{text}"
    for line in _LISTED[: kept.get("detectable_format:number_bullet_lists", (0,))[0]]:
        text += f"\n* {line}"
    if "startend:end_checker" in kept:
        text += f"\n{kept['startend:end_checker'][0]}"
    if "detectable_content:postscript" in kept:
        text += "\nP.S. I will write again."
    return f'"{text}"' if "startend:quotation" in kept else text


def _instruct(rng: random.Random, level: str) -> Problem:
    topic = rng.choice(_TOPICS)
    while True:
        names = rng.sample(list(_CONSTRAINTS), rng.randint(*_INSTRUCT_COUNT[level]))
        if not any(pair <= set(names) for pair in _CONFLICTS):
            break
    drawn = {name: _constraint(rng, name) for name in names}

    def work(slips: Slips) -> str:
        kept = {name: values for name, (_, values) in drawn.items() if not slips.happens()}
        plan = "; ".join(_CONSTRAINTS[name][1].format(*values) for name, values in kept.items())
        return _response([plan], _compose(topic, kept))

    told = " ".join(_CONSTRAINTS[name][0].format(*drawn[name][1]) for name in names)
    reference = {"instruction_id_list": names, "kwargs": [drawn[name][0] for name in names]}
    return Problem(f"Write about {topic}. {told}", reference, work)


_MAKERS = {"math": _math, "code": _code, "stem": _stem, "logic": _logic, "instruct": _instruct}


def split_of(question: str) -> str:
    """The split that a question belongs to, by its hash."""
    bucket = int.from_bytes(hashlib.sha256(question.encode()).digest()[:4]) % VALIDATION_SHARE
    return "validation" if bucket == 0 else "train"


def make_problem(domain: str, level: str, split: str, seed: int, index: int) -> Problem:
    """The problem number `index` of a split, the same on every machine.

    Raises:
      ValueError: unknown domain, level or split.
    """
    for value, known in ((domain, DOMAINS), (level, (*LEVELS, HELD_OUT_LEVEL)), (split, SPLITS)):
        if value not in known:
            raise ValueError(f"data: expected one of {', '.join(known)}, got {value!r}.")
    rng = random.Random(f"{domain}/{level}/{split}/{seed}/{index}")
    for _ in range(math.ceil(200 * VALIDATION_SHARE)):
        problem = _MAKERS[domain](rng, level)
        if split_of(problem.question) == split:
            return problem
    raise ValueError(f"data: no {split} problem of level {level} found in domain {domain}.")


def make_prompt(domain: str, level: str, split: str, seed: int, index: int) -> Prompt:
    """The same problem as a prompt record."""
    problem = make_problem(domain, level, split, seed, index)
    return Prompt(
        id=f"{split}/{domain}/{level}/{seed}/{index}",
        domain=domain,
        level=level,
        verifier=domain,
        messages=({"role": "user", "content": problem.question},),
        reference=problem.reference,
        source="procedural",
    )


def validation_prompts(
    domains: tuple[str, ...], levels: tuple[str, ...], per_cell: int, seed: int
) -> list[Prompt]:
    """`per_cell` prompts with distinct questions for each domain and level.

    Raises:
      ValueError: a cell does not have that many.
    """
    prompts = []
    for domain, level in itertools.product(domains, levels):
        distinct: dict[str, Prompt] = {}
        for index in range(100 * per_cell):
            prompt = make_prompt(domain, level, "validation", seed, index)
            distinct.setdefault(prompt.messages[0]["content"], prompt)
            if len(distinct) == per_cell:
                break
        else:
            raise ValueError(
                f"validation.prompts_per_level: the {level} level of {domain} has about "
                f"{len(distinct)} different held-out prompts, fewer than {per_cell}; ask for less."
            )
        prompts += distinct.values()
    return prompts
