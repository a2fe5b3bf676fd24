import pytest

from tooling.check import Step, run_steps


def fail() -> str:
    raise RuntimeError("the reason")


def test_a_failure_is_named_and_only_what_builds_on_it_is_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = Step("first: does a", fail), Step("second: does b", lambda: "")
    third = Step("third: builds on a", lambda: "", after=first)
    fourth = Step("fourth: finds something", lambda: "2 findings")
    assert run_steps([first, second, third, fourth]) == 1
    assert [step.outcome for step in (first, second, third, fourth)] == [
        "failed",
        "ok",
        "not run, since 'first' is not good",
        "2 findings",
    ]
    out = capsys.readouterr().out
    assert "the reason" in out and out.splitlines()[-1].startswith("make test: FAILED in ")


def test_all_good_is_status_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_steps([Step("one: a", lambda: ""), Step("two: b", lambda: "")]) == 0
    assert "make test: all good in " in capsys.readouterr().out
