"""Look-ups kept: once keys are frozen an example always fetches the same pairs, so training need search only once,
and who used which pair is known for ever. Forgetting an example or a class from such a log needs no forward pass at all.

One byte pair for each codebook and example: 50,000 examples and 256 codebooks are 26 MB.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from papercore.unlearning.arguments import Examples, batches, check_integer
from papercore.unlearning.bottleneck import KeyValueBottleneck, count_usage
from papercore.unlearning.classifier import DKVBClassifier, bottleneck_of

__all__ = ["LookupLog", "look_up"]


@dataclass(frozen=True)
class LookupLog:
    """Pairs that examples fetch while nothing is masked.

    indices    int16 or int32 [N, C] or [N, T, C], on the CPU
    labels     LongTensor [N], or None
    num_pairs  K of the bottleneck that made it
    """

    indices: Tensor
    labels: Tensor | None
    num_pairs: int

    def __len__(self) -> int:
        return len(self.indices)

    def usage(self) -> Tensor:
        """LongTensor [C, K]: how often each pair is fetched."""
        return count_usage(self.indices, self.num_pairs)

    def of_class(self, label: int) -> LookupLog:
        """The examples of one class; ValueError if there are none."""
        if self.labels is None:
            raise ValueError("this log has no labels: make it with look_up(model, (features, labels))")
        chosen = self.labels == check_integer("label", label, least=0)
        if not bool(chosen.any()):
            raise ValueError(f"class {label} is not among the {len(self):,} logged examples")
        return self.at(chosen)

    def at(self, chosen: Tensor) -> LookupLog:
        """Some of the examples, by a BoolTensor [N] or by their numbers."""
        labels = None if self.labels is None else self.labels[chosen]
        return LookupLog(self.indices[chosen], labels, self.num_pairs)


@torch.no_grad()
def look_up(
    model: KeyValueBottleneck | DKVBClassifier, examples: Examples, *, batch_size: int = 1024
) -> LookupLog:
    """Look-ups of all examples as if nothing were masked, with their labels if they have any.

    Args:
        model: a bottleneck (examples are features) or a DKVBClassifier (examples are inputs of its backbone).
        examples: features, a pair (features, labels), or a DataLoader of such batches.

    Raises:
        RuntimeError: the keys have no place yet.
        ValueError: no examples; NaN or infinity; another width.
    """
    bottleneck = bottleneck_of(model)
    check_integer("batch_size", batch_size)
    small = torch.int16 if bottleneck.num_pairs <= 2**15 else torch.int32
    found, labels = [], []
    for inputs, known in batches("examples", examples, batch_size):
        inputs = inputs.to(bottleneck.keys.device)
        features = model.encode(inputs) if isinstance(model, DKVBClassifier) else inputs
        found.append(bottleneck.lookup(features, ignore_mask=True).to("cpu", small))
        if known is not None:
            labels.append(known.cpu())
    if sum(map(len, found)) == 0:
        raise ValueError("examples is empty: expected at least one example")
    return LookupLog(torch.cat(found), torch.cat(labels) if labels else None, bottleneck.num_pairs)
