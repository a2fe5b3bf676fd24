"""Local gradient methods: K workers that train alone and average from time to time (arXiv 2310.14423 and 2303.01215).

QSR, ConstantH, ...        when to average                       schedules.py (no torch)
cosine_lr, ...             learning rates as functions           learning_rates.py (no torch)
communication_volume, ...  rounds, bytes, hours                  communication.py (no torch)
VirtualWorkers             S x K workers in one batched call     virtual.py, stacked.py, stacked_checks.py
"""

from papercore.local_sgd.communication import CommReport, CostModel, communication_volume
from papercore.local_sgd.learning_rates import constant_lr, cosine_lr, linear_lr, power_of_two_lr, step_lr
from papercore.local_sgd.schedules import QSR, SWAP, ConstantH, PiecewiseH, PostLocal, Round, SyncSchedule
from papercore.local_sgd.virtual import VirtualWorkers

__all__ = [
    "QSR",
    "SWAP",
    "CommReport",
    "ConstantH",
    "CostModel",
    "PiecewiseH",
    "PostLocal",
    "Round",
    "SyncSchedule",
    "VirtualWorkers",
    "communication_volume",
    "constant_lr",
    "cosine_lr",
    "linear_lr",
    "power_of_two_lr",
    "step_lr",
]
