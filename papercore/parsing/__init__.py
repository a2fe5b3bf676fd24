"""Exact inside-outside for given grammars, and transformers that carry it out (Zhao et al., 2023, arXiv 2303.08117).

PCFG                               a grammar as three tensors              grammar.py
inside_outside, ...                probabilities, marginals, posteriors    inference.py, chart.py, rules.py
labelled_recall, viterbi, ...      trees from charts                       decoding.py
read, write, to_nltk               grammars as text                        notation.py
eliminate_unaries, LooseRule       rules of one symbol removed exactly     unaries.py
read_treebank, estimate, ...       grammars from parsed sentences          treebank.py, binarisation.py
sample, length_distribution        sentences with trees                    sampling.py
english, english_shifted           two grammars of our own                 english.py
split_symbols                      larger grammars from small ones         latent.py
ConstructedIO, ...                 the algorithm as attention layers       construction.py
Tree, tree_f1, branching           trees and their comparison              trees.py
"""

from papercore.parsing.binarisation import binarise, clean, debinarise
from papercore.parsing.construction import (
    ConstructedIO,
    ConstructionSize,
    IOAttention,
    construction_size,
    merge_bases,
)
from papercore.parsing.decoding import labelled_recall, posterior_sample, viterbi
from papercore.parsing.english import english, english_shifted
from papercore.parsing.grammar import PCFG
from papercore.parsing.inference import (
    ImpossibleSentence,
    IOResult,
    inside_outside,
    log_partition,
    masked_posterior,
)
from papercore.parsing.latent import merge_symbols, split_symbols
from papercore.parsing.notation import read, to_nltk, write
from papercore.parsing.sampling import length_distribution, sample
from papercore.parsing.treebank import estimate, read_treebank, replace_unknown, unknown_class
from papercore.parsing.trees import Tree, TreeScore, branching, tree_f1
from papercore.parsing.unaries import LooseRule, eliminate_unaries

__all__ = [
    "PCFG",
    "ConstructedIO",
    "ConstructionSize",
    "IOAttention",
    "IOResult",
    "ImpossibleSentence",
    "LooseRule",
    "Tree",
    "TreeScore",
    "binarise",
    "branching",
    "clean",
    "construction_size",
    "debinarise",
    "eliminate_unaries",
    "english",
    "english_shifted",
    "estimate",
    "inside_outside",
    "labelled_recall",
    "length_distribution",
    "log_partition",
    "masked_posterior",
    "merge_bases",
    "merge_symbols",
    "posterior_sample",
    "read",
    "read_treebank",
    "replace_unknown",
    "sample",
    "split_symbols",
    "to_nltk",
    "tree_f1",
    "unknown_class",
    "viterbi",
    "write",
]
