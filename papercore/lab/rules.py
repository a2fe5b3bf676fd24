"""Pass rules of claims: small expressions over metric names, read through a whitelist of syntax.

A rule is either a comparison that begins with its operator (`>= 0.9`, applied to the claim's metric) or an expression over the
metrics of a record (`mezo_mean - icl_mean > 2 * diff_se`). Allowed: numbers, names, + - * / **, comparisons, `and`, `or`,
`not`, and the functions abs, min, max, sqrt. Nothing else is ever evaluated.

A comparison with NaN is neither true nor false, and neither is its `not`: a rule holds only when it is true. Arithmetic
without a value (a division by zero, the root of a negative number, an overflow) is NaN.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

BINARY: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: operator.pow,
}  # fmt: skip
COMPARE: dict[type, Callable[[float, float], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
FUNCTIONS: dict[str, Callable[..., float]] = {"abs": abs, "min": min, "max": max, "sqrt": math.sqrt}
# How many arguments each takes: least, most.
ARGUMENTS: dict[str, tuple[int, float]] = {
    "abs": (1, 1),
    "min": (2, math.inf),
    "max": (2, math.inf),
    "sqrt": (1, 1),
}
PLAIN = (
    ast.BoolOp, ast.And, ast.Or, ast.Not, ast.USub, ast.UAdd, ast.Compare, ast.BinOp, ast.UnaryOp, ast.Name, ast.Load, *BINARY, *COMPARE,
)  # fmt: skip
STARTS_WITH_COMPARISON = re.compile(r"^\s*(<=|>=|==|!=|<|>)")
DEEPEST = 100  # levels of a syntax tree; a deeper one is a mistake, and would overflow the stack


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
                raise ValueError(
                    f"rule {self.text!r} begins with a comparison but its claim names no metric."
                )
            source = f"{identifier(metric)} {source}"
        try:
            self.tree: ast.expr = ast.parse(source, mode="eval").body
        except (SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(
                f"rule {self.text!r} does not parse: {getattr(error, 'msg', None) or 'it is nested too deep'}."
            ) from error
        level, depth = [self.tree], 0
        while level := [child for node in level for child in ast.iter_child_nodes(node)]:  # type: ignore[misc]
            depth += 1
        if depth > DEEPEST:
            raise ValueError(
                f"rule {self.text[:60]!r}... is nested {depth} levels deep: expected at most {DEEPEST}."
            )
        _check(self.tree, self.text)
        if not _is_test(self.tree):
            raise ValueError(f"rule {self.text!r} is not a test: it needs a comparison such as '>= 0.9'.")

    @property
    def names(self) -> list[str]:
        """The metrics that the rule reads, as identifiers, in order of appearance."""
        called = {id(n.func) for n in ast.walk(self.tree) if isinstance(n, ast.Call)}
        found = [n for n in ast.walk(self.tree) if isinstance(n, ast.Name) and id(n) not in called]
        found.sort(key=lambda n: (n.lineno, n.col_offset))  # a walk goes level by level
        return list(dict.fromkeys(n.id for n in found))

    def __call__(self, metrics: Mapping[str, float]) -> bool:
        """True when the rule holds; False when it does not, or when a NaN leaves it open. KeyError names a metric that is missing."""
        known = {identifier(name): value for name, value in metrics.items()}
        for name in self.names:
            if name not in known:
                raise KeyError(name)
        return _truth(self.tree, known) is True


def identifier(name: str) -> str:
    """A metric's name as rules write it: every character outside letters, digits and _ becomes _, and a digit in front gets one.

    >>> identifier("eps_1e-4 minus full"), identifier("2nd")
    ('eps_1e_4_minus_full', '_2nd')
    """
    # Python reads names in this normal form.
    plain = re.sub(r"\W", "_", unicodedata.normalize("NFKC", name))
    return plain if plain.isidentifier() else f"_{plain}"


def _is_test(node: ast.expr) -> bool:
    if isinstance(node, ast.BoolOp):
        return all(_is_test(v) for v in node.values)
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Not) and _is_test(node.operand)
    return isinstance(node, ast.Compare)


def _check(node: ast.AST, text: str) -> None:
    for part in ast.walk(node):
        if (
            isinstance(part, ast.Call)
            and isinstance(part.func, ast.Name)
            and part.func.id in FUNCTIONS
            and not part.keywords
        ):
            least, most = ARGUMENTS[part.func.id]
            if not least <= len(part.args) <= most:
                wanted = "one argument" if most == 1 else f"at least {least} arguments"
                raise ValueError(f"rule {text!r}: {part.func.id} takes {wanted}, got {len(part.args)}.")
        elif not isinstance(part, PLAIN) and not (
            isinstance(part, ast.Constant) and type(part.value) in (int, float)
        ):
            raise ValueError(
                f"rule {text!r} uses {type(part).__name__}: allowed are numbers, metric names, + - * / **, comparisons, and, or, not, {', '.join(FUNCTIONS)}."
            )
    for part in ast.walk(node):
        numbers: list[ast.expr] = []
        if isinstance(part, ast.Compare):
            numbers = [part.left, *part.comparators]
        elif isinstance(part, ast.BinOp):
            numbers = [part.left, part.right]
        elif isinstance(part, ast.Call):
            numbers = part.args
        elif isinstance(part, ast.UnaryOp) and not isinstance(part.op, ast.Not):
            numbers = [part.operand]
        if any(
            isinstance(n, (ast.Compare, ast.BoolOp))
            or (isinstance(n, ast.UnaryOp) and isinstance(n.op, ast.Not))
            for n in numbers
        ):
            raise ValueError(
                f"rule {text!r} reckons with a truth value: comparisons are joined by and, or, not alone."
            )


def _truth(node: ast.expr, known: Mapping[str, float]) -> bool | None:
    """True, False, or None where a NaN leaves it open."""
    match node:
        case ast.UnaryOp():
            inner = _truth(node.operand, known)
            return None if inner is None else not inner
        case ast.BoolOp():
            parts = [_truth(value, known) for value in node.values]
            decisive = isinstance(node.op, ast.Or)
            if decisive in parts:
                return decisive
            return None if None in parts else not decisive
        case ast.Compare():
            values = [_number(side, known) for side in (node.left, *node.comparators)]
            pairs = zip(node.ops, values, values[1:], strict=False)
            links = [
                None if math.isnan(a) or math.isnan(b) else COMPARE[type(op)](a, b) for op, a, b in pairs
            ]
            if False in links:
                return False
            return None if None in links else True
    raise AssertionError(f"{type(node).__name__} was let through")


def _number(node: ast.expr, known: Mapping[str, float]) -> float:
    """The value of an arithmetic expression in floating point; NaN where there is none."""
    value: Any
    match node:
        case ast.Constant():
            value = node.value
        case ast.Name():
            value = known[node.id]
        case ast.UnaryOp():
            inner = _number(node.operand, known)
            value = -inner if isinstance(node.op, ast.USub) else inner
        case ast.BinOp():
            value = _reckoned(BINARY[type(node.op)], [_number(node.left, known), _number(node.right, known)])
        case ast.Call():
            assert isinstance(node.func, ast.Name)
            value = _reckoned(FUNCTIONS[node.func.id], [_number(a, known) for a in node.args])
        case _:
            raise AssertionError(f"{type(node).__name__} was let through")
    try:
        return float(value)
    except OverflowError:
        return math.nan  # a whole number beyond all floats


def _reckoned(operation: Callable[..., Any], numbers: list[float]) -> float:
    if any(math.isnan(n) for n in numbers):
        return math.nan
    try:
        value = operation(*numbers)
    except (ZeroDivisionError, OverflowError, ValueError):
        return math.nan
    return math.nan if isinstance(value, complex) else value
