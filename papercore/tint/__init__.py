"""TinT: a transformer whose forward pass fine-tunes a smaller transformer (Panigrahi et al., 2024, arXiv 2307.01189).

TinyGPT     a small auxiliary model of our own     tiny_gpt.py
"""

from papercore.tint.tiny_gpt import TinyGPT, TinyGPTConfig, TinyGPTOutput

__all__ = ["TinyGPT", "TinyGPTConfig", "TinyGPTOutput"]
