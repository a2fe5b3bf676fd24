"""Which grafts are applied to which module: a stack per module, last in, first out.

The stack lives beside the module (weakly, so that it dies with it), never in it: a state dict, a copy or a pickle of
the module knows nothing of grafts.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from papercore.grafting.graft import Handle

_stacks: weakref.WeakKeyDictionary[nn.Module, list[Handle]] = weakref.WeakKeyDictionary()


def active(model: nn.Module) -> list[Handle]:
    """Handles of the grafts that are applied to `model`, the latest last."""
    return list(_stacks.get(model, ()))


def push(model: nn.Module, handle: Handle) -> None:
    """Notes that a graft was applied."""
    _stacks.setdefault(model, []).append(handle)


def drop(model: nn.Module, handle: Handle) -> None:
    """Notes that a graft was removed or became part of the weights."""
    stack = _stacks.get(model, [])
    if handle in stack:
        stack.remove(handle)
