"""What the functions of this package refuse, as classes that can be told apart."""

from __future__ import annotations


class GraftMismatchError(ValueError):
    """The model does not hold the weights that the graft, mask or task vector was made for."""


class GraftStackError(ValueError, RuntimeError):
    """A graft is applied twice, removed twice, or removed while a later one is still applied."""


class NonFiniteError(ValueError, FloatingPointError):
    """A weight, a loss or a gradient is NaN or infinite."""
