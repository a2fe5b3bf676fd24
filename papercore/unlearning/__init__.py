"""Unlearning by masking the pairs of a discrete key-value bottleneck (Shah et al., 2023, arXiv 2311.15268).

KeyValueBottleneck            the module, its mask, erasure       bottleneck.py, search.py, projection.py, key_learning.py
AuditLog                      who was masked, when, by what       audit.py
DKVBClassifier                with a frozen backbone              classifier.py
train_values, look_up, ...    values, and look-ups kept           training.py, lookups.py
unlearn_by_activations, ...   choosing pairs and masking them     forgetting.py
scrub, neggrad_plus, tune ... what masking is measured against  baselines.py, tuning.py
evaluate_unlearning, ...      accuracies, probes, membership    evaluation.py
Flops, bottleneck_flops, ...  with and without the backbone     flops.py
save_bottleneck, ...          safetensors files                 files.py
"""

from papercore.unlearning.audit import AuditEntry, AuditLog
from papercore.unlearning.baselines import (
    BaselineReport,
    distillation,
    fine_tune,
    neggrad_plus,
    retrain,
    scrub,
)
from papercore.unlearning.bottleneck import KeyValueBottleneck, count_usage
from papercore.unlearning.classifier import DKVBClassifier
from papercore.unlearning.evaluation import evaluate_unlearning, linear_probe, membership_inference
from papercore.unlearning.files import load_bottleneck, save_bottleneck
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
from papercore.unlearning.tuning import SCRUB_GRID, TuningResult, tune

__all__ = [
    "SCRUB_GRID",
    "AuditEntry",
    "AuditLog",
    "BaselineReport",
    "DKVBClassifier",
    "Flops",
    "KeyValueBottleneck",
    "LookupLog",
    "TuningResult",
    "UnlearnReport",
    "ValueTraining",
    "bottleneck_flops",
    "count_usage",
    "distillation",
    "evaluate_unlearning",
    "fine_tune",
    "forget_until",
    "linear_probe",
    "load_bottleneck",
    "look_up",
    "measured_flops",
    "membership_inference",
    "neggrad_plus",
    "random_pairs",
    "rank_pairs",
    "retrain",
    "save_bottleneck",
    "scrub",
    "train_values",
    "tune",
    "unlearn_by_activations",
    "unlearn_by_examples",
    "warn_unless_local",
]
