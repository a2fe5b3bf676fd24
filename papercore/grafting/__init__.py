"""Model grafting: the few fine-tuned weights that carry a skill (Panigrahi et al., 2023, arXiv 2302.06600).

task_vector                        what fine-tuning changed                task_vector.py
learn_mask                         which of it matters                     learning.py, paper_rule.py, law.py, exact_k.py,
                                                                           scoring.py
magnitude_mask, first_order_mask   masks from one score                    selection.py
Mask, union, intersection          masks and their algebra                 mask.py
Graft, stitch                      a skill as a patch of kilobytes         graft.py, stack.py, files.py, stitching.py
overlap                            regions compared with chance            comparison.py
expected_calibration_error, ...    are the probabilities right?            calibration.py
sparsity_curve, interpolated       values along sparsity and alpha         curves.py
localize                           where a mask sits                       localisation.py
live                               mixing two models in one module         live.py, entries.py, fingerprint.py
"""

from papercore.grafting.calibration import (
    Reliability,
    calibration_interval,
    expected_calibration_error,
    fit_temperature,
    reliability,
)
from papercore.grafting.comparison import chance_overlap, overlap
from papercore.grafting.curves import CurvePoint, interpolated, interpolation_curve, sparsity_curve
from papercore.grafting.errors import GraftMismatchError, GraftStackError, NonFiniteError
from papercore.grafting.graft import Graft, Handle
from papercore.grafting.law import critical_rate, threshold
from papercore.grafting.learning import LearnedMask, learn_mask
from papercore.grafting.live import LiveWeights, first_order_scores, live
from papercore.grafting.localisation import Region, localize
from papercore.grafting.mask import Mask, intersection, union
from papercore.grafting.scoring import Step
from papercore.grafting.selection import (
    bias_mask,
    first_order_mask,
    magnitude_mask,
    paper_base,
    random_mask,
    top_mask,
)
from papercore.grafting.stitching import collisions, stitch
from papercore.grafting.task_vector import TaskVector, task_vector

__all__ = [
    "CurvePoint",
    "Graft",
    "GraftMismatchError",
    "GraftStackError",
    "Handle",
    "LearnedMask",
    "LiveWeights",
    "Mask",
    "NonFiniteError",
    "Region",
    "Reliability",
    "Step",
    "TaskVector",
    "bias_mask",
    "calibration_interval",
    "chance_overlap",
    "collisions",
    "critical_rate",
    "expected_calibration_error",
    "first_order_mask",
    "first_order_scores",
    "fit_temperature",
    "interpolated",
    "interpolation_curve",
    "intersection",
    "learn_mask",
    "live",
    "localize",
    "magnitude_mask",
    "overlap",
    "paper_base",
    "random_mask",
    "reliability",
    "sparsity_curve",
    "stitch",
    "task_vector",
    "threshold",
    "top_mask",
    "union",
]
