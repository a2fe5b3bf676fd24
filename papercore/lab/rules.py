"""Pass rules of claims: small expressions over metric names, read through a whitelist of syntax.

A rule is either a comparison that begins with its operator (`>= 0.9`, applied to the claim's metric) or an expression over the
metrics of a record (`mezo_mean - icl_mean > 2 * diff_se`). Allowed: numbers, names, + - * / **, comparisons, `and`, `or`,
`not`, and the functions abs, min, max, sqrt. Nothing else is ever evaluated.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: operator.pow,
}  # fmt: skip
COMPARE: dict[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
FUNCTIONS: dict[str, Callable[..., Any]] = {"abs": abs, "min": min, "max": max, "sqrt": math.sqrt}
STARTS_WITH_COMPARISON = re.compile(r"^\s*(<=|>=|==|!=|<|>)")


class Rule:
    """A rule that was read and found to be allowed syntax.

    Args:
        text: the rule.
        metric: the name that a rule starting with a comparison is about.

    Raises:
        ValueError: the text does not parse, uses syntax outside the whitelist, or cannot be true or false.
    """

    def __init__(self, text: str, metric: str | None = None) -> None:
        self.text = str(text).strip()
        source = self.text
        if STARTS_WITH_COMPARISON.match(source):
            if not metric:
                raise ValueError(f"rule {self.text!r} begins with a comparison but its claim names no metric.")
            source = f"{identifier(metric)} {source}"
        try:
            self.tree: ast.expr = ast.parse(source, mode="eval").body
        except SyntaxError as error:
            raise ValueError(f"rule {self.text!r} does not parse: {error.msg}.") from error
        _check(self.tree, self.text)
        if not _is_test(self.tree):
            raise ValueError(f"rule {self.text!r} is not a test: it needs a comparison such as '>= 0.9'.")

    @property
    def names(self) -> list[str]:
        """The metrics that the rule reads, as identifiers, in order of appearance."""
        called = {id(n.func) for n in ast.walk(self.tree) if isinstance(n, ast.Call)}
        found = [n.id for n in ast.walk(self.tree) if isinstance(n, ast.Name) and id(n) not in called]
        return list(dict.fromkeys(found))

    def __call__(self, metrics: Mapping[str, float]) -> bool:
        """True when the rule holds. A NaN makes every comparison false. KeyError names a metric that is missing."""
        known = {identifier(name): value for name, value in metrics.items()}
        try:
            return bool(_value(self.tree, known))
        except ZeroDivisionError:
            return False


def identifier(name: str) -> str:
    """A metric's name as rules write it: every character outside letters, digits and _ becomes _."""
    return re.sub(r"\W", "_", name)


def _is_test(node: ast.expr) -> bool:
    if isinstance(node, ast.BoolOp):
        return all(_is_test(v) for v in node.values)
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Not) and _is_test(node.operand)
    return isinstance(node, ast.Compare)


def _check(node: ast.AST, text: str) -> None:
    for part in ast.walk(node):
        good = (
            isinstance(part, (ast.BoolOp, ast.And, ast.Or, ast.Not, ast.USub, ast.UAdd, ast.Compare, ast.BinOp, ast.UnaryOp, ast.Name, ast.Load))
            or type(part) in BINARY
            or type(part) in COMPARE
            or (isinstance(part, ast.Constant) and isinstance(part.value, (int, float)))
            or (isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id in FUNCTIONS and not part.keywords)
        )
        if not good:
            raise ValueError(f"rule {text!r} uses {type(part).__name__}: allowed are numbers, metric names, + - * / **, comparisons, and, or, not, {', '.join(FUNCTIONS)}.")


def _value(node: ast.AST, known: Mapping[str, float]) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            if node.id not in known:
                raise KeyError(node.id)
            return known[node.id]
        case ast.UnaryOp():
            inner = _value(node.operand, known)
            return not inner if isinstance(node.op, ast.Not) else (-inner if isinstance(node.op, ast.USub) else inner)
        case ast.BinOp():
            return BINARY[type(node.op)](_value(node.left, known), _value(node.right, known))
        case ast.BoolOp():
            values = (_value(v, known) for v in node.values)
            return all(values) if isinstance(node.op, ast.And) else any(values)
        case ast.Compare():
            left = _value(node.left, known)
            for op, right_node in zip(node.ops, node.comparators, strict=True):
                right = _value(right_node, known)
                if not COMPARE[type(op)](left, right):
                    return False
                left = right
            return True
        case ast.Call():
            assert isinstance(node.func, ast.Name)
            return FUNCTIONS[node.func.id](*(_value(a, known) for a in node.args))
    raise ValueError(f"unexpected syntax {type(node).__name__}")
