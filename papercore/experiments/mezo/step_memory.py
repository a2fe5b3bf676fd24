"""What one MeZO step holds in memory beside the weights, next to the ways it could be done otherwise.

Measured on a decoder of about 5 million weights with 128 tokens: large enough that weights and activations differ in size.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from papercore.lab.decoder import Decoder, DecoderConfig
from papercore.lab.memory import peak_allocated
from papercore.mezo import MeZO, noise
from papercore.mezo.weights import CHUNK


def step_memory(device: torch.device) -> dict[str, float]:
    """Peaks in bytes above what was allocated before.

    forward_peak: one forward pass. mezo_extra: a MeZO step above a forward pass. naive_extra: the same with a stored z.
    adam_peak: weights excluded, gradients, moments and activations of a step of Adam. chunk: the buffer that MeZO may use.
    """
    generator = torch.Generator().manual_seed(0)
    model = Decoder(DecoderConfig(4096, width=256, layers=5, heads=8, context=128), generator=generator).to(
        device
    )
    ids = torch.randint(0, 4096, (4, 33), generator=generator).to(device)

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def forward() -> None:
        with torch.no_grad():
            loss()

    optimizer = MeZO(model.parameters(), lr=1e-6, dist="rademacher")

    def naive() -> None:
        with torch.no_grad():
            z = [noise(0, 0, p.numel(), device=device).view_as(p) for p in model.parameters()]
            for scale in (1e-3, -2e-3, 1e-3):
                for p, zp in zip(model.parameters(), z, strict=True):
                    p.add_(zp, alpha=scale)
                if scale != 1e-3:
                    loss()

    adam = torch.optim.Adam(model.parameters(), lr=1e-6)

    def backprop() -> None:
        adam.zero_grad(set_to_none=True)
        loss().backward()
        adam.step()

    forward()  # the first call allocates what later ones reuse
    optimizer.step(loss)
    forward_peak = peak_allocated(forward, device)
    mezo_peak = peak_allocated(lambda: optimizer.step(loss), device)
    naive_peak = peak_allocated(naive, device)
    adam_peak = peak_allocated(backprop, device)
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    return {
        "forward_peak": forward_peak, "mezo_extra": max(0, mezo_peak - forward_peak), "naive_extra": naive_peak - forward_peak, "adam_peak": adam_peak,
        "chunk": CHUNK * 4, "largest_weight": max(sizes), "weights_bytes": sum(sizes),
    }  # fmt: skip
