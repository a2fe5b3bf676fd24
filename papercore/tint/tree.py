"""A tree of modules with the auxiliary's names: h.0.attn.v_proj.descent simulates the descent of h.0.attn.v_proj.

An operation's roles are its children `forward`, `backward` and, where it has weights, `descent`. nn.Module has a method of the name of the
first, which is why Operation answers it with the child; calling an operation calls its forward role.
"""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["Branch", "Operation"]


class Branch(nn.Module):
    """A place in the tree that mirrors the auxiliary's; children by name, or by number where they are layers."""

    def __getitem__(self, index: int) -> nn.Module:
        return self._modules[str(index)]  # type: ignore[return-value]

    def place(self, path: str, module: nn.Module) -> None:
        """Put `module` at a dotted path below, making branches on the way."""
        head, _, rest = path.partition(".")
        if not rest:
            self._modules[head] = module
            return
        if head not in self._modules:
            self._modules[head] = Branch()
        child = self._modules[head]
        assert isinstance(child, Branch)
        child.place(rest, module)


class Operation(Branch):
    """One operation of the auxiliary in its roles: children `forward`, `backward` and, where it has weights, `descent`.

    Calling it calls `forward`.
    """

    def __init__(self, **roles: nn.Module) -> None:
        super().__init__()
        for role, module in roles.items():
            self._modules[role] = module

    @property
    def forward(self) -> Any:  # type: ignore[override]
        if "forward" not in self._modules:
            raise AttributeError(f"{type(self).__name__} has no role 'forward' of its own")
        return self._modules["forward"]
