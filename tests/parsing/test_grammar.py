"""The grammar object: what it refuses, truncation, and lengths in closed form against simulation and a known case."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from papercore.parsing import PCFG, english, inside_outside, length_distribution, read
from tests.parsing.reference import random_grammar

# The draft of the sheet's section 6.1: the loose rules that the first version of the English grammar had, words left out.
DRAFT = """
ROOT: S PUNC 1
S: NPs VPs .46 | NPp VPp .38 | PP S .08 | S CS .08
CS: CC S 1
NPs: DTs Nbs .50 | NPs PP .12 | NPs RCs .10 | PRNs .10 | NAME .18
NPp: DTp Nbp .42 | NPp PP .12 | NPp RCp .10 | NPs CNP .08 | PRNp .16 | NNp .12
CNP: CC NPs .6 | CC NPp .4
Nbs: ADJ Nbs .25 | NNs .65 | NNs NNs .10
Nbp: ADJ Nbp .25 | NNp .65 | NNs NNp .10
RCs: WH VPs .6 | WH GAP .4
RCp: WH VPp .6 | WH GAP .4
GAP: NPs VTs .5 | NPp VTp .5
VPs: VTs NPs .20 | VTs NPp .14 | VIs .16 | VPs PP .12 | VSs SB .10 | ADV VPs .06 | MOD VPb .10 | BEs VPg .12
VPp: VTp NPs .20 | VTp NPp .14 | VIp .16 | VPp PP .12 | VSp SB .10 | ADV VPp .06 | MOD VPb .10 | BEp VPg .12
VPb: VTb NPs .30 | VTb NPp .20 | VIb .20 | VPb PP .12 | VSb SB .10 | NEG VPb .08
VPg: VTg NPs .34 | VTg NPp .26 | VIg .25 | VPg PP .15
SB: COMP S 1
PP: IN NPs .6 | IN NPp .4
"""


def draft() -> PCFG:
    lines, parents, children = [], set(), []
    for line in DRAFT.strip().split("\n"):
        parent, _, sides = line.partition(": ")
        parents.add(parent)
        for side in sides.split(" | "):
            *names, number = side.split()
            children += names
            lines.append(f"{parent} -> {' '.join(names)} [{number}]")
    tags = sorted(set(children) - parents)
    return read("\n".join([*lines, *(f"{tag} -> '{tag}' [1.0]" for tag in tags)]))


def simulated_length(grammar: PCFG, draws: int, generator: torch.Generator) -> Tensor:
    """Words of sentences rewritten one symbol at a time: no table of the package, no levels."""
    inner = len(grammar.nonterminals)
    flat = grammar.rules.flatten(1)
    lengths = []
    for _ in range(draws):
        open_nodes = [int(torch.multinomial(grammar.root, 1, generator=generator))]
        words = 0
        while open_nodes:
            pair = int(torch.multinomial(flat[open_nodes.pop()], 1, generator=generator))
            for child in divmod(pair, len(grammar.symbols)):
                if child < inner:
                    open_nodes.append(child)
                else:
                    words += 1
        lengths.append(words)
    return torch.tensor(lengths, dtype=torch.float64)


def test_the_draft_grammar_of_the_sheet() -> None:
    """Sizes, spectral radius, expected length and mean length when cut at 20 as measured there by other code."""
    grammar = draft()
    assert len(grammar.nonterminals) == 17
    assert len(grammar.preterminals) == 29
    assert int((grammar.rules > 0).sum()) == 115
    assert grammar.spectral_radius() == pytest.approx(0.767, abs=5e-4)
    assert grammar.expected_length() == pytest.approx(12.7, abs=0.05)
    shares = length_distribution(grammar, 20)
    assert float(shares @ torch.arange(21.0, dtype=torch.float64) / shares.sum()) == pytest.approx(
        9.1, abs=0.05
    )


def test_expected_length_and_counts_against_simulation() -> None:
    grammar = random_grammar(2, 2, 3, seed=3)
    grammar = PCFG(
        grammar.root,
        grammar.rules
        + 3 * torch.eye(4, dtype=torch.float64)[2] * torch.eye(4, dtype=torch.float64)[3].unsqueeze(1),
        grammar.emissions,
        nonterminals=grammar.nonterminals,
        preterminals=grammar.preterminals,
        vocabulary=grammar.vocabulary,
        normalize=True,
    )
    lengths = simulated_length(grammar, 3000, torch.Generator().manual_seed(0))
    assert abs(float(lengths.mean()) - grammar.expected_length()) < 4 * float(lengths.std()) / math.sqrt(3000)
    counts = grammar.expected_counts()
    assert float(counts[2:].sum()) == pytest.approx(grammar.expected_length())
    assert float(counts[:2].sum()) == pytest.approx(
        grammar.expected_length() - 1
    )  # n words, n - 1 nodes above them


def test_lengths_of_a_geometric_grammar() -> None:
    """S -> S A with q: lengths 2 + geometric, mean 2 + q / (1 - q), radius q."""
    grammar = read("S -> S A [0.75] | A A [0.25]\nA -> 'x' [1.0]")
    assert grammar.spectral_radius() == pytest.approx(0.75)
    assert grammar.expected_length() == pytest.approx(5)
    assert grammar.expected_counts().tolist() == pytest.approx([4, 5])
    critical = read("S -> S S [0.5] | A A [0.5]\nA -> 'x' [1.0]")
    assert critical.spectral_radius() == pytest.approx(1)
    assert critical.expected_length() == math.inf
    with pytest.raises(
        ValueError, match=r"spectral radius of this grammar is 1\.0000 >= 1: expected counts are infinite"
    ):
        critical.expected_counts()


def test_truncation_keeps_the_frequent_and_changes_nothing_else() -> None:
    grammar = english(dtype=torch.float64)
    whole = grammar.truncate(len(grammar.nonterminals), len(grammar.preterminals))
    assert torch.equal(whole.rules, grammar.rules)
    assert torch.equal(whole.emissions, grammar.emissions)
    small = grammar.truncate(15, 30)
    assert (len(small.nonterminals), len(small.preterminals), small.vocabulary) == (
        15,
        30,
        grammar.vocabulary,
    )
    assert not small.proper
    counts = dict(zip(grammar.symbols, grammar.expected_counts().tolist(), strict=True))
    left_out = set(grammar.nonterminals) - set(small.nonterminals)
    assert max(counts[a] for a in left_out) <= min(counts[a] for a in small.nonterminals)
    place = {name: k for k, name in enumerate(grammar.symbols)}
    at = [place[name] for name in small.symbols]
    assert torch.equal(small.rules, grammar.rules[at[:15]][:, at][:, :, at])
    ids = grammar.encode("the dog saw a cat")[None]
    log_z = [float(inside_outside(g, ids).log_z) for g in (grammar, small, grammar.truncate(8, 15))]
    assert log_z[0] >= log_z[1] >= log_z[2]


def test_truncation_keeps_the_start_and_takes_weights() -> None:
    grammar = read("S -> T T [1.0]\nT -> T A [0.5] | A A [0.3] | B B [0.2]\nA -> 'x' [1.0]\nB -> 'y' [1.0]")
    assert grammar.truncate(1, 1).nonterminals == ("S",)
    assert grammar.truncate(2, 1).preterminals == ("A",)
    assert grammar.truncate(2, 1, weights=torch.tensor([1.0, 1, 0, 1])).preterminals == ("B",)
    with pytest.raises(ValueError, match=r"in_terminals = 3: expected 1 to 2\."):
        grammar.truncate(3, 1)
    with pytest.raises(ValueError, match=r"pre_terminals = 0: expected 1 to 2\."):
        grammar.truncate(1, 0)
    with pytest.raises(ValueError, match=r"weights of shape \(3,\): expected one for each of the 4 symbols"):
        grammar.truncate(1, 1, weights=torch.ones(3))


def parts(**changed: object) -> dict[str, object]:
    whole: dict[str, object] = {
        "root": torch.tensor([1.0]),
        "rules": torch.tensor([[[0.0, 0.2], [0.3, 0.5]]]),
        "emissions": torch.tensor([[0.25, 0.75]]),
        "nonterminals": ["S"],
        "preterminals": ["A"],
        "vocabulary": ["x", "y"],
    }
    return {**whole, **changed}


def made(**changed: object) -> PCFG:
    kept = parts(**changed)
    return PCFG(kept.pop("root"), kept.pop("rules"), kept.pop("emissions"), **kept)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"root": torch.ones(2)}, r"root has the shape \(2,\), expected \(1,\) for 1 in-terminals, 1 pre-terminals, 2 words"),
        ({"rules": torch.ones(1, 2)}, r"rules has the shape \(1, 2\), expected \(1, 2, 2\)"),
        ({"emissions": torch.tensor([[0.5, float("nan")]])}, "emissions holds NaN or infinity"),
        ({"emissions": torch.tensor([[1.5, -0.5]])}, "emissions holds -0.5; expected probabilities from 0 to 1"),
        ({"emissions": torch.tensor([[0.25, 0.75]]).log()}, r"They look like logarithms: pass their exp\(\)"),
        ({"emissions": torch.tensor([[0.25, 0.5]])}, r"the words of 'A' add up to 0\.75, expected 1: pass probabilities .*normalize=True"),
        ({"rules": torch.ones(1, 2, 2)}, "the rules of 'S' add up to 4, expected 1"),
        ({"root": torch.tensor([0.5])}, "the root distribution add up to 0.5, expected 1"),
        ({"root": torch.tensor([1.5]), "proper": False}, "the root distribution add up to 1.5, expected at most 1"),
        ({"nonterminals": []}, "nonterminals is empty: a grammar needs at least one"),
        ({"vocabulary": ["x", "x"]}, "vocabulary holds 'x' more than once"),
        ({"preterminals": ["S"]}, "'S' is an in-terminal and a pre-terminal"),
    ],
)  # fmt: skip
def test_refusals(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**changed)


def test_wrong_kinds() -> None:
    with pytest.raises(TypeError, match="rules must be a tensor of floating-point probabilities, got list"):
        made(rules=[[[0.0, 0.2], [0.3, 0.5]]])
    with pytest.raises(
        TypeError, match="root must be a tensor of floating-point probabilities, got torch.int64"
    ):
        made(root=torch.tensor([1]))


def test_half_precision_is_used_in_float32_with_a_warning() -> None:
    with pytest.warns(
        UserWarning, match="root is torch.float16, too coarse for charts: it is used in float32"
    ):
        grammar = made(root=torch.tensor([1.0], dtype=torch.float16))
    assert grammar.root.dtype == torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made()


def test_normalize() -> None:
    grammar = made(root=torch.tensor([3.0]), rules=torch.ones(1, 2, 2), normalize=True)
    assert grammar.root.tolist() == [1.0]
    assert grammar.rules.flatten().tolist() == [0.25] * 4


def test_words_and_ids() -> None:
    grammar = made()
    assert grammar.encode("y x y").tolist() == [1, 0, 1]
    assert grammar.encode([["y"], ["x", "y"]]).tolist() == [[1, 0], [0, 1]]
    assert grammar.encode("y zebra", unk="x").tolist() == [1, 0]
    assert grammar.decode(torch.tensor([1, 0, 2])) == ["y", "x", "_"]
    with pytest.raises(KeyError, match="not in the vocabulary of 2 words: 'bee', 'zebra'. Give unk="):
        grammar.encode("zebra x bee")
    with pytest.raises(ValueError, match="unk = 'z' is not in the vocabulary of 2 words"):
        grammar.encode("x", unk="z")
    with pytest.raises(ValueError, match="a sentence needs at least one word"):
        grammar.encode("")


def test_copies() -> None:
    grammar = english()
    double = grammar.double()
    assert double.dtype == torch.float64
    assert torch.equal(double.rules.float(), grammar.rules)
    assert grammar.truncate(5, 5).double().proper is False
    assert (
        repr(grammar)
        == "PCFG(26 in-terminals, 42 pre-terminals, 286 words, 194 binary rules, torch.float32, cpu)"
    )
