import random

import pytest

from prolong_jax.config import TINY_BASE
from prolong_jax.data import procedural
from prolong_jax.data.mixture import prompt_at
from prolong_jax.tokenizer import ChatTokenizer
from prolong_jax.verifiers import VERIFIERS

CELLS = [
    (domain, level)
    for domain in procedural.DOMAINS
    for level in (*procedural.LEVELS, procedural.HELD_OUT_LEVEL)
]


def problems(domain, level, split="train", count=40, seed=0):
    return [procedural.make_problem(domain, level, split, seed, i) for i in range(count)]


def careful(problem):
    return problem.work(procedural.Slips(random.Random(0), 0.0))


@pytest.mark.parametrize("domain, level", CELLS)
def test_the_worked_response_is_right_and_a_careless_one_is_not(domain, level):
    verify = VERIFIERS[domain]
    careless = []
    for problem in problems(domain, level, count=15):
        verdict = verify("<think>" + careful(problem), problem.reference)
        assert verdict.score == 1, (problem.question, careful(problem), verdict)
        slipped = problem.work(procedural.Slips(random.Random(0), 1.0))
        careless.append(verify("<think>" + slipped, problem.reference).score)
    assert sum(careless) < 0.6 * len(careless)


@pytest.mark.parametrize("domain, level", CELLS)
def test_token_budgets(domain, level):
    tokenizer = ChatTokenizer(TINY_BASE)
    for problem in problems(domain, level, count=60):
        prompt, opened = tokenizer.encode_chat([{"role": "user", "content": problem.question}])
        response = tokenizer._tokenizer.encode(careful(problem), add_special_tokens=False)
        assert opened == "<think>"
        assert len(prompt) <= 64 and len(response) + 1 <= 128, problem.question


def test_problems_are_functions_of_seed_and_index():
    for domain, level in CELLS:
        one, again = (
            [p.question for p in problems(domain, level, count=10, seed=s)] for s in (5, 5)
        )
        other = [p.question for p in problems(domain, level, count=10, seed=6)]
        assert one == again and one != other


def test_splits_and_levels_do_not_overlap():
    seen: dict[str, tuple[str, str]] = {}
    for domain, level in CELLS:
        for split in procedural.SPLITS:
            for problem in problems(domain, level, split, count=150):
                kind = (level, split)
                if level == procedural.HELD_OUT_LEVEL:
                    kind = (level, "")  # never trained on, so its own splits do not matter
                assert seen.setdefault(problem.question, kind) == kind


def test_validation_prompts_are_distinct_and_balanced():
    prompts = procedural.validation_prompts(procedural.DOMAINS, procedural.LEVELS, 16, seed=7)
    assert len({p.messages[0]["content"] for p in prompts}) == len(prompts) == 5 * 3 * 16
    assert len({p.id for p in prompts}) == len(prompts)
    assert all(procedural.split_of(p.messages[0]["content"]) == "validation" for p in prompts)


def test_the_mixture_follows_its_weights_and_its_position():
    mixture, levels = {"math": 3.0, "code": 1.0}, {"easy": 1.0, "hard": 1.0}
    prompts = [prompt_at(i, 0, mixture, levels) for i in range(400)]
    assert {p.domain for p in prompts} == {"math", "code"}
    assert 0.68 < sum(p.domain == "math" for p in prompts) / 400 < 0.82
    assert {p.level for p in prompts} == {"easy", "hard"}
    assert prompts[7] == prompt_at(7, 0, mixture, levels) != prompt_at(7, 1, mixture, levels)
    assert len({p.id for p in prompts}) == 400


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="data: expected one of math, code"):
        procedural.make_problem("maths", "easy", "train", 0, 0)
