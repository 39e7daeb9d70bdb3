"""What the scores of sampled responses say of a policy: pass@k, maj@k and intervals over prompts."""

from collections.abc import Sequence

import numpy as np


def pass_at_k(solved: int, samples: int, k: int) -> float:
    r"""Unbiased estimate of the probability that k samples hold a right one (arXiv 2107.03374).

    1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n-c+1..n} (1 - k / i): the share of the subsets of k
    among the n samples that hold one of the c right ones. The product has no large terms, and it
    is zero where n - c < k, for then it has the factor 1 - k / k.

    Args:
      solved: c, right ones among the samples.
      samples: n.
      k: in [1, n].

    Raises:
      ValueError: numbers out of range.
    """
    if not (0 <= solved <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@k: expected 0 <= c <= n and 1 <= k <= n, got {solved, samples, k}.")
    return float(1.0 - np.prod(1.0 - k / np.arange(samples - solved + 1, samples + 1)))


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, ... below `most`, and `most` itself: the k that are shown."""
    return [2**i for i in range(most.bit_length()) if 2**i < most] + [most]


def maj_at_k(answers: Sequence[str | None], scores: Sequence[float]) -> float:
    """The score of the most frequent answer among the samples at hand (arXiv 2203.11171).

    Equal texts are one answer, and its score is the mean of its samples' scores. A sample without
    an answer (None) has no vote. Answers with as many votes share the outcome, as if one of them
    were drawn; without any vote it is 0.
    """
    votes: dict[str, list[float]] = {}
    for answer, score in zip(answers, scores, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(score)
    most = max(map(len, votes.values()), default=0)
    elected = [sum(found) / most for found in votes.values() if len(found) == most]
    return float(sum(elected) / len(elected)) if elected else 0.0


def bootstrap_interval(values: np.ndarray, resamples: int = 2000) -> list[float]:
    """95% percentile interval of the mean, by resampling the values (prompts) with replacement."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (resamples, len(values))).mean(axis=1)
    return [float(q) for q in np.quantile(means, (0.025, 0.975))]


def paired_difference(before: np.ndarray, after: np.ndarray) -> tuple[float, list[float]]:
    """Mean of after - before over the same prompts, and its 95% bootstrap interval.

    A prompt is drawn with both of its values, so what makes it hard for both policies cancels out.
    """
    return float(np.mean(after - before)), bootstrap_interval(after - before)
