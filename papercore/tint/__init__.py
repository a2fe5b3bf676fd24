"""TinT: a transformer whose forward pass fine-tunes a smaller transformer (Panigrahi et al., 2024, arXiv 2307.01189).

TinTModel, TinTConfig          the simulator                       model.py, blocks.py, config.py, weights.py, targets.py
LinearForward, ...             one module for each operation       linear.py, normalisation.py, activation.py, attention.py
Layout                         where numbers stand in tokens       layout.py, literal.py, literal_attention.py (the heads)
SoftmaxAttention, DualWeight   other ways to the same numbers      softmax.py, dual.py
loss_gradient, output_loss     the end of the auxiliary            output.py
count_parameters, flops        size and cost of the simulator      counting.py
dynamic_eval                   the same steps by autograd          dynamic.py
TinyGPT                        a small auxiliary of our own        tiny_gpt.py
read_auxiliary                 other auxiliaries                   auxiliary.py, families.py
"""

from papercore.tint.activation import ActivationBackward, ActivationForward, GatedBackward, GatedForward
from papercore.tint.attention import AttentionBackward, AttentionForward, Rotary
from papercore.tint.auxiliary import Auxiliary, read_auxiliary
from papercore.tint.config import SimulatorShape, TinTConfig, simulator_shape
from papercore.tint.counting import Flops, TinTCount, count_parameters, flops
from papercore.tint.dual import DualWeight
from papercore.tint.dynamic import dynamic_eval
from papercore.tint.layout import Layout
from papercore.tint.linear import LinearBackward, LinearDescent, LinearForward
from papercore.tint.model import TinTModel, TinTOutput
from papercore.tint.normalisation import LayerNormBackward, LayerNormDescent, LayerNormForward
from papercore.tint.output import loss_gradient, output_loss
from papercore.tint.softmax import SoftmaxAttention
from papercore.tint.tiny_gpt import TinyGPT, TinyGPTConfig, TinyGPTOutput

__all__ = [
    "ActivationBackward",
    "ActivationForward",
    "AttentionBackward",
    "AttentionForward",
    "Auxiliary",
    "Flops",
    "DualWeight",
    "GatedBackward",
    "GatedForward",
    "LayerNormBackward",
    "LayerNormDescent",
    "LayerNormForward",
    "Layout",
    "LinearBackward",
    "LinearDescent",
    "LinearForward",
    "Rotary",
    "SimulatorShape",
    "SoftmaxAttention",
    "TinTConfig",
    "TinTCount",
    "TinTModel",
    "TinTOutput",
    "TinyGPT",
    "TinyGPTConfig",
    "TinyGPTOutput",
    "count_parameters",
    "dynamic_eval",
    "flops",
    "loss_gradient",
    "output_loss",
    "read_auxiliary",
    "simulator_shape",
]
