"""The metrics of GLUE, by scikit-learn and SciPy; 1 is best, and 0 stands for an undefined value."""

from collections.abc import Callable, Sequence
from typing import Any

Metric = Callable[[Sequence[float], Sequence[float]], float]


def accuracy(labels: Sequence[float], predicted: Sequence[float]) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predicted))


def f1(labels: Sequence[float], predicted: Sequence[float]) -> float:
    """Return the F1 of class 1 of two classes."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, zero_division=0))


def matthews_correlation(labels: Sequence[float], predicted: Sequence[float]) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predicted))


def pearson(scores: Sequence[float], predicted: Sequence[float]) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, scores, predicted)


def spearman(scores: Sequence[float], predicted: Sequence[float]) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, scores, predicted)


def _correlation(of: Callable[..., Any], scores: Sequence[float], predicted: Sequence[float]) -> float:
    """Return the correlation; it is undefined if all values are the same."""
    is_constant = len(set(scores)) == 1 or len(set(predicted)) == 1
    return 0.0 if is_constant else float(of(scores, predicted).statistic)
