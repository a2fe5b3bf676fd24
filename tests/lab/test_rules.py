"""Rules of claims: what they may say, what they mean, and that nothing outside the whitelist is ever evaluated."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from papercore.lab.rules import FUNCTIONS, Rule, identifier

NAN = math.nan


@pytest.mark.parametrize(
    ("text", "metrics", "holds"),
    [
        (">= 0.9", {"x": 0.9}, True),
        (">= 0.9", {"x": 0.89}, False),
        ("< 4", {"x": 3}, True),
        ("<= 4", {"x": 4}, True),
        ("== 7", {"x": 7}, True),
        ("!= 7", {"x": 7}, False),
        ("  > 1", {"x": 2}, True),
        ("< 4 and y > 1", {"x": 3, "y": 2}, True),
        ("a - b > 2 * se", {"a": 1.0, "b": 0.5, "se": 0.2}, True),
        ("a - b > 2 * se", {"a": 1.0, "b": 0.5, "se": 0.25}, False),
        ("0.7 < a < 1.3", {"a": 1.0}, True),
        ("0.7 < a < 1.3", {"a": 1.4}, False),
        ("1 < a > 0", {"a": 2}, True),
        ("a == b == c", {"a": 1, "b": 1, "c": 2}, False),
        ("a > 0 or b > 0", {"a": -1, "b": 1}, True),
        ("not a > 0", {"a": -1}, True),
        ("not (a > 0 and b > 0)", {"a": 1, "b": 1}, False),
        ("max(a, b, c) <= 2 * min(a, b, c)", {"a": 1, "b": 2, "c": 1.5}, True),
        ("abs(a + 1) < 0.1", {"a": -1.05}, True),
        ("sqrt(a) == 3", {"a": 9}, True),
        ("2 ** 3 ** 2 == 512", {}, True),
        ("-a ** 2 == -4", {"a": 2}, True),
        ("+a / 4 == 0.5", {"a": 2}, True),
        ("1e-6 >= gap", {"gap": 1e-7}, True),
        ("a - 1 - 1 == 0", {"a": 2}, True),
        ("max > 3", {"max": 4}, True),  # a metric may be called like a function
    ],
)
def test_rules_mean_what_they_say(text, metrics, holds):
    assert Rule(text, "x")(metrics) is holds


@pytest.mark.parametrize(
    ("text", "metrics"),
    [
        ("x > 1", {"x": NAN}),
        ("x != 1", {"x": NAN}),
        ("x == x", {"x": NAN}),
        ("not x > 1", {"x": NAN}),
        ("not (x > 1 or y > 1)", {"x": NAN, "y": 0}),
        ("max(y, x) <= 2", {"x": NAN, "y": 1}),
        ("max(x, y) <= 2", {"x": NAN, "y": 1}),
        ("min(y, x) <= 2", {"x": NAN, "y": 1}),
        ("x ** 0 == 1", {"x": NAN}),
        ("0 < y < x", {"x": NAN, "y": 1}),
        ("x > 1 and y > 0", {"x": NAN, "y": 1}),
        ("1 / x >= 0 or 1 / x < 0", {"x": 0}),
        ("not 1 / x > 5", {"x": 0}),
        ("sqrt(x) >= 0", {"x": -1}),
        ("x ** 0.5 != 1", {"x": -1}),
        ("x ** x > 1", {"x": 1e300}),
        ("x - x == 0", {"x": math.inf}),
    ],
)
def test_a_claim_never_holds_by_what_is_no_number(text, metrics):
    assert Rule(text)(metrics) is False


@pytest.mark.parametrize(
    ("text", "metrics", "holds"),
    [
        ("x > 1 or y > 0", {"x": NAN, "y": 1}, True),  # true whatever x is
        ("not (x > 1 and y > 0)", {"x": NAN, "y": -1}, True),
        ("y != 0 and x / y > 1", {"x": 1, "y": 0}, False),
        ("y == 0 or x / y > 1", {"x": 1, "y": 0}, True),
    ],
)
def test_what_a_nan_does_not_touch_is_decided(text, metrics, holds):
    assert Rule(text)(metrics) is holds


@pytest.mark.parametrize(
    "text",
    [
        "x.real > 1",
        "x.__class__ > 1",
        "().__class__ > 1",
        "open('f') > 1",
        "__import__('os') > 1",
        "print(x) > 1",
        "eval(x) > 1",
        "pow(x, 2) > 1",
        "max([x, y]) > 1",
        "max(*x, y) > 1",
        "max(x, y, key=abs) > 1",
        "abs(x)(y) > 1",
        "(lambda: 1)() > 1",
        "[i for i in x] > 1",
        "(i for i in x) > 1",
        "{1: 2} > 1",
        "x[0] > 1",
        "(x, y) > 1",
        "'a' > x",
        "b'a' > x",
        "f'{x}' > x",
        "1j == x",
        "True > x",
        "None == x",
        "... == x",
        "x // 2 > 1",
        "x % 2 == 1",
        "x @ y > 1",
        "x << 2 > 1",
        "x | y > 1",
        "~x > 1",
        "x is y",
        "x in y",
        "x > 1 if y > 1 else x < 1",
        "(y := x) > 1",
        "await x > 1",
    ],
)
def test_syntax_outside_the_whitelist_is_refused(text):
    with pytest.raises(
        ValueError, match=r"^rule .* (uses \w+: allowed are numbers, metric names|does not parse|max takes)"
    ):
        Rule(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not parse"),
        ("x >", "does not parse"),
        ("x > 1; y > 1", "does not parse"),
        ("x = 1", "does not parse"),
        ("x", "is not a test: it needs a comparison such as '>= 0.9'"),
        ("x + 1", "is not a test"),
        ("x > 1 and y", "is not a test"),
        ("not x", "is not a test"),
        ("1", "is not a test"),
        ("max(x > 1, y)", "reckons with a truth value"),
        ("max(x > 1, y) > 0", "reckons with a truth value"),
        ("(x > 1) + (y > 1) >= 1", "reckons with a truth value"),
        ("(x > 1) == (y > 1)", "reckons with a truth value"),
        ("-(not x > 1) > 0", "reckons with a truth value"),
        ("abs(x, y) > 1", "abs takes one argument, got 2"),
        ("sqrt() > 1", "sqrt takes one argument, got 0"),
        ("max(x) > 1", "max takes at least 2 arguments, got 1"),
        ("-" * 5000 + "1 > 0", "does not parse"),
        ("not " * 500 + "x > 0", "is nested 50. levels deep: expected at most 100"),
        ("(" * 500 + "x" + ")" * 500 + " > 0", "does not parse"),
        ("x \0 > 1", "null bytes"),
        ("lambda > 1", "does not parse"),
    ],
)
def test_what_is_no_test_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Rule(text)


def test_a_comparison_alone_needs_a_metric():
    with pytest.raises(
        ValueError, match="rule '>= 0.9' begins with a comparison but its claim names no metric"
    ):
        Rule(">= 0.9")


def test_a_metric_that_is_missing_is_named_wherever_it_stands():
    for metrics in ({"a": 1}, {"a": -1}):
        with pytest.raises(KeyError, match="gone"):
            Rule("a > 0 and gone > 1")(metrics)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("accuracy", "accuracy"),
        ("eps_1e-4_minus_full", "eps_1e_4_minus_full"),
        ("k=16/full mean", "k_16_full_mean"),
        ("2nd", "_2nd"),
        ("µ", "μ"),  # the micro sign is read as the Greek letter
        ("x²", "x2"),
        ("Größe", "Größe"),
    ],
)
def test_names_with_other_characters_are_written_as_identifiers(name, written):
    assert identifier(name) == written
    assert Rule(f"{written} > 1").names == [written]
    assert Rule(f"{written} > 1")({name: 2}) and Rule("> 1", name)({name: 2})


def test_the_names_of_a_rule_come_in_order_and_once():
    assert Rule("max(b, a) - b > sqrt(c) and 0 < a").names == ["b", "a", "c"]
    assert Rule("> 0 and y < 1", "x-1").names == ["x_1", "y"]


@pytest.mark.timeout(20)
def test_towers_of_powers_end_at_once():
    assert Rule("9 ** 9 ** 9 ** 9 > 1")({}) is False  # beyond all floats: no number
    assert Rule("10 ** 300 > 1")({}) is True
    assert Rule(f"{'9' * 400} > 1")({}) is False


# Written as floats, so that Python reckons in floats too; powers are small and whole, so that none is complex or infinite.
NUMBERS = st.one_of(
    st.integers(0, 9).map("{}.0".format),
    st.floats(0, 100).map(lambda v: repr(round(v, 3))),
    st.sampled_from("abc"),
)


def _arithmetic(inner):
    return st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from("+-*/"), inner),
        st.builds("({} ** {}.0)".format, NUMBERS, st.integers(0, 3)),
        st.builds("(-{})".format, inner),
        st.builds("{}({}, {})".format, st.sampled_from(["min", "max"]), inner, inner),
        st.builds("{}({})".format, st.sampled_from(["abs", "sqrt"]), inner),
    )


EXPRESSIONS = st.recursive(NUMBERS, _arithmetic, max_leaves=5)
OPERATORS = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
COMPARISONS = st.one_of(
    st.builds("{} {} {}".format, EXPRESSIONS, OPERATORS, EXPRESSIONS),
    st.builds("{} {} {} {} {}".format, NUMBERS, OPERATORS, EXPRESSIONS, OPERATORS, NUMBERS),
)
TESTS = st.recursive(
    COMPARISONS,
    lambda inner: st.one_of(
        st.builds("({} and {})".format, inner, inner),
        st.builds("({} or {})".format, inner, inner),
        st.builds("not ({})".format, inner),
    ),
    max_leaves=4,
)
VALUES = st.one_of(st.integers(-5, 5).map(float), st.floats(-100, 100).map(lambda v: round(v, 3)))
METRICS = st.fixed_dictionaries({"a": VALUES, "b": VALUES, "c": VALUES})


@given(TESTS, METRICS)
def test_rules_agree_with_python_wherever_python_has_a_number(text, metrics):
    """Python's own `eval`, on texts made here, is the reference; numbers are floats on both sides."""
    try:
        expected = eval(text, {**metrics, **FUNCTIONS, "__builtins__": {}})
    except (ZeroDivisionError, OverflowError, ValueError):
        assume(False)
    assert Rule(text)(metrics) is expected


@given(TESTS, METRICS, st.sampled_from("abc"), st.lists(VALUES, min_size=1, max_size=4))
def test_a_rule_that_holds_with_a_nan_holds_whatever_stands_there(text, metrics, name, values):
    rule = Rule(text)
    if rule({**metrics, name: NAN}):
        assert all(rule({**metrics, name: value}) for value in values)


@given(st.lists(st.sampled_from(["a", "b", "1", "2.5", ">", "<=", "==", "and", "or", "not", "(", ")", "+", "-", "**", "/", ".", ",", "[", "]", "abs", "max", "lambda", ":", "'", "in", "if", "else", "~", "=", "{", "}", "\n", "#", "%", "é"]), max_size=12).map(" ".join))  # fmt: skip
def test_any_text_is_either_a_rule_or_a_value_error(text):
    try:
        rule = Rule(text, "a")
    except ValueError as error:
        assert str(error).startswith("rule ")
    else:
        assert rule({"a": 1.0, "b": 2.0, "abs": 1.0, "max": 2.0, "é": 0.0}) in {True, False}
