"""A frozen backbone, a bottleneck, and, if values are not logits, a decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from papercore.unlearning.arguments import check_integer
from papercore.unlearning.bottleneck import KeyValueBottleneck

__all__ = ["DKVBClassifier", "bottleneck_of"]


class DKVBClassifier(nn.Module):
    """logits = decoder(bottleneck(backbone(x))); the backbone runs in eval mode, without gradients, whatever train() says.

    Args:
        backbone: maps inputs to features [B, dim] or [B, T, dim]; its parameters are frozen here.
        bottleneck: reads them.
        decoder: maps [B, dim_value] to logits; None: the values are logits, and dim_value must equal num_classes.
        num_classes: checked against dim_value where there is no decoder.
        backbone_flops: operations of the backbone for one input, for the accounts of `unlearn_by_activations` and others.

    Raises:
        ValueError: dim_value is not num_classes, and there is no decoder.

    >>> bottleneck = KeyValueBottleneck(4, 2, 3, dim_key=2, dim_value=5)
    >>> DKVBClassifier(nn.Identity(), bottleneck, num_classes=10)
    Traceback (most recent call last):
        ...
    ValueError: dim_value=5 but num_classes=10: without a decoder the values are the logits, so give dim_value=10 or a decoder
    """

    def __init__(
        self,
        backbone: nn.Module,
        bottleneck: KeyValueBottleneck,
        *,
        decoder: nn.Module | None = None,
        num_classes: int | None = None,
        backbone_flops: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(bottleneck, KeyValueBottleneck):
            raise TypeError(f"bottleneck must be a KeyValueBottleneck, got {type(bottleneck).__name__}")
        if decoder is None and num_classes is not None and num_classes != bottleneck.dim_value:
            raise ValueError(
                f"dim_value={bottleneck.dim_value} but num_classes={num_classes}: without a decoder the values are the logits, so give "
                f"dim_value={num_classes} or a decoder"
            )
        self.backbone, self.bottleneck = backbone, bottleneck
        self.decoder = nn.Identity() if decoder is None else decoder
        self.backbone_flops = check_integer("backbone_flops", backbone_flops, least=0)
        self.backbone.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> DKVBClassifier:
        super().train(mode)
        # Batch statistics that drift would move every head away from its keys.
        self.backbone.eval()
        return self

    @torch.no_grad()
    def encode(self, inputs: Tensor) -> Tensor:
        """Features of the frozen backbone."""
        self.backbone.eval()
        return self.backbone(inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.decoder(self.bottleneck(self.encode(inputs)))


def bottleneck_of(model: object) -> KeyValueBottleneck:
    """The bottleneck of a model that is one or has one as `.bottleneck`."""
    found = model if isinstance(model, KeyValueBottleneck) else getattr(model, "bottleneck", None)
    if not isinstance(found, KeyValueBottleneck):
        raise TypeError(
            f"model must be a KeyValueBottleneck, or have one as .bottleneck (DKVBClassifier), got {type(model).__name__}"
        )
    return found
