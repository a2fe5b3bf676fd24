"""Local gradient methods: K workers that train alone and average from time to time (arXiv 2310.14423 and 2303.01215).

QSR, ConstantH, ...        when to average                       schedules.py (no torch)
cosine_lr, ...             learning rates as functions           learning_rates.py (no torch)
communication_volume, ...  rounds, bytes, hours                  communication.py (no torch)
LocalOptimizer, ...        K processes, torch.distributed        optimizer.py, wrapped.py, averaging.py, flat.py,
                                                              agreement.py, buffers.py
VirtualWorkers             S x K workers in one batched call     virtual.py, stacked.py, stacked_checks.py
psi, slow_sde_drift, ...   the Slow SDE, exact and dense         slow_sde.py, manifold.py
simulate_hyperbola, ...    a problem with exact theory           hyperbola.py, hyperbola_path.py
sharpness                  top eigenvalue and trace              sharpness.py
LabelNoise                 fresh label noise                     label_noise.py
"""

from papercore.local_sgd.buffers import reestimate_batch_norm
from papercore.local_sgd.communication import CommReport, CostModel, communication_volume
from papercore.local_sgd.hyperbola import predict_hyperbola, simulate_hyperbola
from papercore.local_sgd.hyperbola_path import HyperbolaPath
from papercore.local_sgd.label_noise import LabelNoise
from papercore.local_sgd.learning_rates import constant_lr, cosine_lr, linear_lr, power_of_two_lr, step_lr
from papercore.local_sgd.manifold import project_to_manifold
from papercore.local_sgd.optimizer import LocalOptimizer
from papercore.local_sgd.schedules import QSR, SWAP, ConstantH, PiecewiseH, PostLocal, Round, SyncSchedule
from papercore.local_sgd.sharpness import Sharpness, sharpness
from papercore.local_sgd.slow_sde import Drift, label_noise_regularizer, psi, psi_integral, slow_sde_drift
from papercore.local_sgd.virtual import VirtualWorkers

__all__ = [
    "QSR",
    "SWAP",
    "CommReport",
    "ConstantH",
    "CostModel",
    "Drift",
    "HyperbolaPath",
    "LabelNoise",
    "LocalOptimizer",
    "PiecewiseH",
    "PostLocal",
    "Round",
    "Sharpness",
    "SyncSchedule",
    "VirtualWorkers",
    "communication_volume",
    "constant_lr",
    "cosine_lr",
    "label_noise_regularizer",
    "linear_lr",
    "power_of_two_lr",
    "predict_hyperbola",
    "project_to_manifold",
    "psi",
    "psi_integral",
    "reestimate_batch_norm",
    "sharpness",
    "simulate_hyperbola",
    "slow_sde_drift",
    "step_lr",
]
