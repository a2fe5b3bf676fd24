"""A small ambiguous English-like grammar of our own, and a second one with the same symbols and words and other probabilities.

Three sources of ambiguity, so that a word's neighbours do not give the tree away: words shared between categories (paint, guard,
visit are nouns and verbs; seen forms such as painted are past and participle; -ing forms are adjectives too; "that" is a determiner,
a pronoun, a relative and a conjunction; "before" is a preposition and a conjunction); attachment of prepositional phrases, relative
and adverbial clauses; coordination. Number agreement (s singular, p plural) runs through subjects and verbs, across relative
clauses, so that a masked verb depends on words far away.

Symbols. ROOT start, a statement S or a question Q; CS "and" S; ADVC adverbial clause; SB that-clause; INF infinitive. NPs, NPp noun phrases, CNP "and" NP, POSS
"the dog 's", Nbs, Nbp nouns with adjectives. RCs, RCp relative clauses, GAP those without object. VPs, VPp, VPb (base form), VPg
(-ing), VPn (participle); OBJ2 two objects; QS, QP a question's rest; PP, BYP prepositional phrases; AP adjectives.
"""

from __future__ import annotations

import torch

from papercore.parsing.grammar import PCFG
from papercore.parsing.unaries import LooseRule, eliminate_unaries

__all__ = ["english", "english_shifted"]

# Weights of each alternative in `english` / in `english_shifted`; each column adds up to 1 for each symbol.
_RULES = """
ROOT: S .9/.85 | Q .1/.15
S: NPs VPs .43/.39 | NPp VPp .37/.33 | PP S .07/.05 | S CS .06/.08 | S ADVC .05/.10 | ADVC S .02/.05
Q: DOs QS .50/.35 | DOp QP .50/.65
QS: NPs VPb 1/1
QP: NPp VPb 1/1
CS: CC S 1/1
ADVC: SUB S 1/1
SB: COMP S 1/1
INF: TO VPb 1/1
NPs: DTs Nbs .46/.30 | POSS Nbs .05/.10 | NPs PP .12/.14 | NPs RCs .09/.13 | PRNs .10/.15 | NAME .18/.18
NPp: DTp Nbp .38/.30 | POSS Nbp .04/.08 | NPp PP .12/.14 | NPp RCp .09/.13 | NPs CNP .09/.08 | PRNp .15/.16 | NNp .13/.11
CNP: CC NPs .6/.45 | CC NPp .4/.55
POSS: NPs POS .75/.6 | NPp POS .25/.4
Nbs: AP Nbs .22/.30 | NNs .68/.56 | NNs NNs .10/.14
Nbp: AP Nbp .22/.30 | NNp .68/.56 | NNs NNp .10/.14
AP: ADJ .85/.75 | DEG ADJ .15/.25
RCs: WH VPs .58/.40 | WH GAP .42/.60
RCp: WH VPp .58/.40 | WH GAP .42/.60
GAP: NPs VTs .5/.45 | NPp VTp .5/.55
VPs: VTs NPs .18/.15 | VTs NPp .13/.13 | VIs .14/.10 | VPs PP .12/.15 | VSs SB .07/.10 | VCs INF .05/.07 | VDs OBJ2 .05/.05 | ADV VPs .06/.05 | MOD VPb .08/.07 | BEs VPg .06/.05 | BEs VPn .06/.08
VPp: VTp NPs .18/.15 | VTp NPp .13/.13 | VIp .14/.10 | VPp PP .12/.15 | VSp SB .07/.10 | VCp INF .05/.07 | VDp OBJ2 .05/.05 | ADV VPp .06/.05 | MOD VPb .08/.07 | BEp VPg .06/.05 | BEp VPn .06/.08
VPb: VTb NPs .26/.23 | VTb NPp .18/.20 | VIb .19/.14 | VPb PP .11/.14 | VSb SB .08/.10 | VCb INF .05/.07 | VDb OBJ2 .05/.05 | NEG VPb .08/.07
VPg: VTg NPs .34/.30 | VTg NPp .26/.26 | VIg .25/.22 | VPg PP .15/.22
VPn: VTn .35/.25 | VTn BYP .40/.50 | VPn PP .25/.25
OBJ2: NPs NPs .5/.4 | NPp NPs .3/.3 | NPs NPp .2/.3
PP: IN NPs .6/.5 | IN NPp .4/.5
BYP: BY NPs .6/.5 | BY NPp .4/.5
"""

# Nouns: singular, plural. Many are verbs below, too.
_NOUNS = """
dog cat child farmer teacher doctor king house garden river city book letter bird horse boat tree song story picture
help guard visit call judge run fall walk paint lift smile laugh sleep cook watch dream
"""
_VERBS = """
help guard visit call judge paint lift watch cook follow find see know like fear chase hear draw
"""
_INTRANSITIVE = "run fall walk smile laugh sleep dream sing arrive wait work dance"
_CLAUSE = "say think believe know hope dream"
_CONTROL = "want hope try like need"
_DITRANSITIVE = "give show send tell"
_FORMS = {  # third person, -ing, past, participle where the rules below do not make them
    "run": "runs running ran run",
    "fall": "falls falling fell fallen",
    "sleep": "sleeps sleeping slept slept",
    "find": "finds finding found found",
    "see": "sees seeing saw seen",
    "know": "knows knowing knew known",
    "hear": "hears hearing heard heard",
    "draw": "draws drawing drew drawn",
    "sing": "sings singing sang sung",
    "say": "says saying said said",
    "think": "thinks thinking thought thought",
    "give": "gives giving gave given",
    "show": "shows showing showed shown",
    "send": "sends sending sent sent",
    "tell": "tells telling told told",
    "try": "tries trying tried tried",
}
_PLURALS = {"child": "children", "city": "cities", "story": "stories"}
_WORDS = {
    "CC": "and or but",
    "SUB": "because when before after since while until",
    "COMP": "that",
    "TO": "to",
    "BY": "by",
    "POS": "'s",
    "WH": "that who which",
    "DTs": "the a this that every some no another each",
    "DTp": "the some these those many no most several",
    "PRNs": "it someone everyone nobody this that",
    "PRNp": "they some these those many others most",
    "NAME": "anna ben clara david emma felix grace henry iris june mark will rose",
    "ADJ": "old big red new young small happy quiet sleeping running painted known broken cold",
    "DEG": "very quite too rather",
    "ADV": "often never always then quietly still now",
    "IN": "in with of on near before after since by behind for to under",
    "MOD": "can will must may should could",
    "NEG": "not",
    "BEs": "is was",
    "BEp": "are were",
    "DOs": "does did can will",
    "DOp": "do did can will",
}
_ZIPF = 0.8  # weight of the r-th word of a class: r ** -_ZIPF


def _inflected(verb: str) -> tuple[str, str, str, str]:
    """Third person, -ing form, past and participle."""
    if verb in _FORMS:
        third, ing, past, participle = _FORMS[verb].split()
        return third, ing, past, participle
    stem = verb.removesuffix("e")
    third = verb + ("es" if verb.endswith(("ch", "sh", "s")) else "s")
    return third, stem + "ing", stem + "ed", stem + "ed"


def _classes() -> dict[str, list[str]]:
    """Words of every pre-terminal, the most frequent first."""
    classes = {name: words.split() for name, words in _WORDS.items()}
    nouns = _NOUNS.split()
    classes["NNs"] = nouns
    plurals = [_PLURALS.get(n, n + ("es" if n.endswith(("ch", "sh")) else "s")) for n in nouns]
    classes["NNp"] = plurals
    for kind, listed in (
        ("VT", _VERBS),
        ("VI", _INTRANSITIVE),
        ("VS", _CLAUSE),
        ("VC", _CONTROL),
        ("VD", _DITRANSITIVE),
    ):
        base = listed.split()
        forms = [_inflected(verb) for verb in base]
        past = [form[2] for form in forms]
        # Present forms agree with the subject, past forms do not.
        classes[kind + "s"] = _interleaved([form[0] for form in forms], past)
        classes[kind + "p"] = _interleaved(base, past)
        classes[kind + "b"] = base
        if kind in ("VT", "VI"):
            classes[kind + "g"] = [form[1] for form in forms]
        if kind == "VT":
            classes[kind + "n"] = [form[3] for form in forms]
    return classes


def _interleaved(first: list[str], second: list[str]) -> list[str]:
    return list(dict.fromkeys(word for pair in zip(first, second, strict=True) for word in pair))


def _loose(column: int) -> list[LooseRule]:
    """All rules, with the weights of one column; the second also turns the order of the words in every class round."""
    rules = []
    for line in _RULES.strip().split("\n"):
        parent, _, sides = line.partition(": ")
        for side in sides.split(" | "):
            *children, numbers = side.split()
            rules.append(LooseRule(parent, tuple(children), float(numbers.split("/")[column])))
    for name, words in _classes().items():
        ranks = range(1, len(words) + 1) if column == 0 else range(len(words), 0, -1)
        weights = [rank**-_ZIPF for rank in ranks]
        rules += [
            LooseRule(name, (word,), weight / sum(weights), lexical=True)
            for word, weight in zip(words, weights, strict=True)
        ]
    return rules


def english(*, dtype: torch.dtype = torch.float32) -> PCFG:
    """The grammar: 26 in-terminals, 42 pre-terminals and 286 words; sentences of two or more words.

    >>> grammar = english()
    >>> grammar.spectral_radius() < 0.9
    True
    >>> grammar.decode(grammar.encode("the dog saw a cat"))
    ['the', 'dog', 'saw', 'a', 'cat']
    """
    return eliminate_unaries(_loose(0), dtype=dtype)


def english_shifted(*, dtype: torch.dtype = torch.float32) -> PCFG:
    """Symbols, words and their order as in `english`, other probabilities: deeper trees, longer sentences, and in every class the
    rare words are frequent. For measuring what carries over to another distribution."""
    return eliminate_unaries(_loose(1), dtype=dtype)
