"""Unlearning by masking the pairs of a discrete key-value bottleneck (Shah et al., 2023, arXiv 2311.15268).

KeyValueBottleneck            the module, its mask, erasure       bottleneck.py, search.py, projection.py, key_learning.py
AuditLog                      who was masked, when, by what       audit.py
DKVBClassifier                with a frozen backbone              classifier.py
train_values, look_up, ...    values, and look-ups kept           training.py, lookups.py
unlearn_by_activations, ...   choosing pairs and masking them     forgetting.py
Flops, bottleneck_flops, ...  operations with and without the backbone   flops.py
"""

from papercore.unlearning.audit import AuditEntry, AuditLog
from papercore.unlearning.bottleneck import KeyValueBottleneck, count_usage
from papercore.unlearning.classifier import DKVBClassifier
from papercore.unlearning.flops import Flops, bottleneck_flops, measured_flops
from papercore.unlearning.forgetting import (
    UnlearnReport,
    forget_until,
    random_pairs,
    rank_pairs,
    unlearn_by_activations,
    unlearn_by_examples,
)
from papercore.unlearning.lookups import LookupLog, look_up
from papercore.unlearning.training import ValueTraining, train_values, warn_unless_local

__all__ = [
    "AuditEntry",
    "AuditLog",
    "DKVBClassifier",
    "Flops",
    "KeyValueBottleneck",
    "LookupLog",
    "UnlearnReport",
    "ValueTraining",
    "bottleneck_flops",
    "count_usage",
    "forget_until",
    "look_up",
    "measured_flops",
    "random_pairs",
    "rank_pairs",
    "train_values",
    "unlearn_by_activations",
    "unlearn_by_examples",
    "warn_unless_local",
]
