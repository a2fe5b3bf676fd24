"""Inside-outside for any probabilistic context-free grammar (Zhao et al., 2023, arXiv 2303.08117).

PCFG                          a grammar as tensors                 grammar.py
inside_outside, ...           probabilities, marginals, posteriors inference.py, chart.py, rules.py
labelled_recall, viterbi, ... trees from charts                    decoding.py
Tree, tree_f1, branching      trees and their score                trees.py
"""

from papercore.parsing.decoding import labelled_recall, posterior_sample, viterbi
from papercore.parsing.grammar import PCFG
from papercore.parsing.inference import (
    ImpossibleSentence,
    IOResult,
    inside_outside,
    log_partition,
    masked_posterior,
)
from papercore.parsing.trees import Tree, TreeScore, branching, tree_f1

__all__ = [
    "PCFG",
    "IOResult",
    "ImpossibleSentence",
    "Tree",
    "TreeScore",
    "branching",
    "inside_outside",
    "labelled_recall",
    "log_partition",
    "masked_posterior",
    "posterior_sample",
    "tree_f1",
    "viterbi",
]
