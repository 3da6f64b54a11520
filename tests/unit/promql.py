"""Reads of PromQL what tests need to know: which series an expression names, and by which labels.

No parser: it is enough for the expressions of `deploy/`, and fails on names that it takes for metrics wrongly.
"""

import re
from dataclasses import dataclass

_KEYWORDS = frozenset({"and", "or", "unless", "bool", "offset", "by", "on", "without", "ignoring", "group_left"})
_GROUPING = re.compile(r"\b(by|on|without|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_NAME = re.compile(r"(?<![\w.:$])([a-zA-Z_:][\w:]*)\s*(\{[^}]*\}|\()?")


@dataclass(frozen=True)
class Selector:
    """A metric and the labels that it is narrowed by."""

    name: str
    labels: frozenset[str]


def selectors(expr: str) -> list[Selector]:
    """Every metric that an expression names."""
    return [
        Selector(name, frozenset(re.findall(r"(\w+)\s*[=!]", after or "")))
        for name, after in _NAME.findall(_GROUPING.sub("", _bare(expr)))
        if after != "(" and name not in _KEYWORDS
    ]


def grouping_labels(expr: str) -> set[str]:
    """Every label that an expression adds up or matches by."""
    return {label for _, labels in _GROUPING.findall(_bare(expr)) for label in re.findall(r"\w+", labels)}


def result_labels(expr: str, labels_of: dict[str, set[str]]) -> set[str]:
    """The labels of what an expression gives: those of its first aggregation, else those of its first metric.

    Args:
        expr: The expression.
        labels_of: The labels of each metric.
    """
    aggregation = re.match(r"[\s(\d*.]*(?:histogram_quantile\([\d.]+,\s*)?(?:sum|max|min|count)\b", expr)
    if aggregation is None:
        return set(labels_of[selectors(expr)[0].name])
    first = _GROUPING.match(_bare(expr[aggregation.end() :]).lstrip())
    spent = {"le"} if "histogram_quantile" in aggregation[0] else set()
    return set(re.findall(r"\w+", first[2])) - spent if first is not None else set()


def _bare(expr: str) -> str:
    """Without strings, ranges and offsets."""
    return re.sub(r"\[[^\]]*\]|\boffset\s+\w+", "", re.sub(r'"(?:[^"\\]|\\.)*"', '""', expr))
