"""MeZO (Malladi et al., 2023, arXiv 2305.17333, algorithms 1 and 2) as a torch optimizer: two forward passes,
no backward pass, the memory of inference.

Glossary
    theta            trained weights                                                                     [d]
    z                direction drawn from the counter-based noise, never stored                          [d]
    eps              size of the perturbation
    n                draws a step; the estimate is their mean (n-SPSA)
    l+, l-           losses at theta + eps z and theta - eps z
    projected_grad   (l+ - l-) / (2 eps), one scalar a draw, kept in float32
    g_hat            projected_grad * z, the estimate of the gradient
    centre           theta itself, as opposed to theta +- eps z

Different from the paper's code on purpose: noise from counters instead of a reseeded global generator; the
return to the centre and the update in one pass; every scalar kept in a log from which the run can be
replayed; losses that are not finite never reach the weights.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from papercore.mezo.arguments import (
    check_choice,
    check_positive_integer,
    decays_by_name,
    entries_of,
    scalar_of,
    unique_parameters,
)
from papercore.mezo.distributed import Ranks
from papercore.mezo.log import Retreat, ZOLog
from papercore.mezo.moves import Moves
from papercore.mezo.noise import BACKENDS, check_seed, resolve_backend
from papercore.mezo.replay import base_of
from papercore.mezo.resume import packed, unpacked
from papercore.mezo.settings import Settings, check_group, check_rule, single
from papercore.mezo.watch import Watch, checked_call, moved, versions
from papercore.mezo.weights import Weights

Closure = Callable[[], Tensor | float]
DecayFilter = Callable[[str, Tensor], bool]


class MeZO(Optimizer):
    """Memory-efficient zeroth-order SGD, momentum or Adam (algorithms 1 and 2; section 2.1; appendix B).

    A step evaluates the closure at theta + eps z and theta - eps z for each of n directions z and moves
    against their mean slope. Extra memory is one chunk of noise, in exact mode one more copy of the trained
    weights.

    Arguments
        params         parameters, (name, parameter) pairs or groups of either; those that do not require a
                       gradient are left alone; tied weights count once. Names go into the log and let replay
                       find the weights again.
        lr             step size, >= 0; groups and schedulers may change it
        eps            perturbation, > 0. A group with its own gets the unbiased estimate of definition 6
        n              draws a step; scale lr with n
        dist           "gaussian" as in the paper, or "rademacher": one bit a weight, many times faster to
                       make, with the smaller variance factor (d + n - 1) / n of the sphere (lemma 2)
        weight_decay   lambda, decoupled: theta <- (1 - lr lambda) theta - lr g_hat
        momentum       mu of torch.optim.SGD, recomputed from the log over a window
        betas          (beta1, beta2) of torch.optim.Adam, recomputed likewise
        seed           master seed in [0, 2^64); the seed of each draw follows from it (draw_seed)
        process_group  None: no communication at all. A group: all ranks step alike and exchange one scalar a
                       draw (distributed.py)
        mode           "inplace": perturbed and restored by additions, which round (up to 3 ulp a step; the
                       drift matters in half precision). "exact": written from a copy at the centre, so that
                       only the update rounds
        pipelined      the update waits for the next step's first perturbation: 2 passes over the weights a
                       step instead of 3. Between steps the weights stand at theta - eps z until flush();
                       state_dict() and log.save() flush by themselves
        backend        "torch" (the reference), "numba", "triton", or "auto": the fastest that is installed
                       for each device
        decay_filter   None: all weights decay; "no_bias_norm": not biases and LayerNorms (by name; without
                       names, by having fewer than two dimensions); or f(name, parameter) -> bool
        adam_eps       epsilon of Adam
        window         updates that momentum and Adam look back on, each of them a stream of noise; None:
                       until mu^window or beta1^window < 1e-6 (132 for 0.9), beta2^window < 1e-3 (6,905 for
                       0.999)
        split          "batch": every rank evaluates the same directions on its own equal share of the batch.
                       "directions": n of its own on the same batch (needs mode="exact")
        check_every    with a group: steps between comparisons of the ranks' weights; 0: never
        on_nonfinite   "raise" or "skip" when a loss is NaN or infinite; the weights are restored first
        zero_patience  warn after so many successive steps whose losses were identical on both sides
        debug          evaluate every loss twice and watch the parameters: RuntimeError if the closure is
                       random, changes weights or computes gradients

    The closure takes nothing and returns the loss, a float or a tensor of one element. It is called 2n times
    a step under torch.no_grad(), must use one and the same batch in all of them, and may average over
    micro-batches. Nothing switches dropout off: call model.eval() first, as the paper's code does, or the two
    losses differ by chance.

    Raises ValueError and TypeError for arguments out of range or of a wrong kind.

    >>> from torch import nn
    >>> model = nn.Linear(3, 1)
    >>> optimizer = MeZO(model.named_parameters(), lr=0.05, eps=1e-3, seed=1)
    >>> x, y = torch.ones(8, 3), torch.zeros(8, 1)
    >>> losses = [optimizer.step(lambda: nn.functional.mse_loss(model(x), y)) for _ in range(60)]
    >>> losses[-1] < 0.1 * losses[0]
    True
    >>> len(optimizer.log)
    60
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        eps: float = 1e-3,
        *,
        n: int = 1,
        dist: str = "gaussian",
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        betas: tuple[float, float] | None = None,
        seed: int = 0,
        process_group: Any = None,
        mode: str = "inplace",
        pipelined: bool = False,
        backend: str = "auto",
        decay_filter: DecayFilter | str | None = None,
        adam_eps: float = 1e-8,
        window: int | None = None,
        split: str = "batch",
        check_every: int = 1000,
        on_nonfinite: str = "raise",
        zero_patience: int = 20,
        debug: bool = False,
    ) -> None:
        check_choice("split", split, ("batch", "directions"))
        check_choice("on_nonfinite", on_nonfinite, ("raise", "skip"))
        check_choice("backend", backend, BACKENDS)
        if split == "directions" and process_group is not None and mode != "exact":
            raise ValueError(
                "split='directions' needs mode='exact': ranks that perturb in place along different "
                "directions round differently and drift apart"
            )
        rule = {"dist": dist, "mode": mode, "pipelined": pipelined, "momentum": momentum, "betas": betas}
        rule |= {"adam_eps": adam_eps, "window": window}
        check_rule(seed=0, backend=backend, **rule)  # type: ignore[arg-type]  # before any communication
        self._n = check_positive_integer("n", n)
        self._split, self._debug, self._on_nonfinite = split, bool(debug), on_nonfinite
        self._check_every = check_positive_integer("check_every", check_every, zero=True)
        self._decay_filter = decays_by_name(decay_filter)
        self._backend = backend
        self._watch = Watch(check_positive_integer("zero_patience", zero_patience))
        self._log: ZOLog | None = None
        self._stepping = False
        self._last_losses: tuple[float, ...] = ()
        self._projected_grad = math.nan
        seed = check_seed(seed)
        super().__init__(unique_parameters(params), {"lr": lr, "eps": eps, "weight_decay": weight_decay})
        self._weights = self._weigh()
        resolved = [resolve_backend(backend, tensor.device) for tensor in self._weights.tensors]
        self._ranks = None if process_group is None else Ranks(process_group, self._weights)
        if self._ranks is not None:
            seed = self._ranks.agree_on_seed(seed)
        self._start(ZOLog(check_rule(seed=seed, backend=resolved[-1], **rule)))  # type: ignore[arg-type]

    # ---- groups and settings

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group. RuntimeError after the first step: the log numbers the weights of the whole run."""
        if self._log is not None and len(self._log):
            raise RuntimeError(
                "a group cannot be added after the first step: make a new optimizer, its log starts there"
            )
        super().add_param_group(param_group)
        check_group(self.param_groups[-1])
        if self._log is not None:
            self._weights = self._weigh()
            self._start(self._log)

    def _weigh(self) -> Weights:
        return Weights(entries_of(self.param_groups, self._decay_filter))

    def _start(self, log: ZOLog) -> None:
        self._log = log
        log.before_save = self.flush
        self._moves = Moves(self._weights, log, self._backend)
        self._versions = versions(self._weights)

    def _settings(self) -> Settings:
        ranks = self._ranks.size if self._ranks is not None and self._split == "directions" else 1
        return Settings(self._n * ranks, tuple(check_group(group) for group in self.param_groups))

    @property
    def n(self) -> int:
        """Draws a step, on each rank; may be changed between steps."""
        return self._n

    @n.setter
    def n(self, value: int) -> None:
        self._n = check_positive_integer("n", value)

    # ---- what a step leaves behind

    @property
    def log(self) -> ZOLog:
        """(seed, projected gradient) of every step so far."""
        assert self._log is not None
        return self._log

    @property
    def projected_grad(self) -> float:
        """Mean over the last step's draws; NaN before the first step and after a skipped one."""
        return self._projected_grad

    @property
    def last_losses(self) -> tuple[float, ...]:
        """The 2n losses of the last step on this rank: l+ and l- of each draw in turn."""
        return self._last_losses

    @property
    def extra_nbytes(self) -> int:
        """Bytes kept between steps beside the log: the copy at the centre in exact mode, else 0."""
        return self._weights.nbytes if self.log.rule.mode == "exact" else 0

    # ---- the step

    def step(self, closure: Closure | None = None) -> float:  # type: ignore[override]
        """2n evaluations of the closure and one update. Returns the mean of the 2n losses, on this rank.

        Raises TypeError or ValueError for a closure that is missing or returns no scalar; FloatingPointError
        if a loss is NaN or infinite on any rank (the weights are restored, and the step is not in the log);
        RuntimeError for what debug=True finds and for parameters that were frozen, cast or overwritten.
        """
        if not callable(closure):
            raise TypeError(f"closure must be a function that returns the loss, got {closure!r}")
        settings, log = self._settings(), self.log
        step = len(log)
        # Outside inference mode, so that no inference tensor can end up among the weights.
        with torch.inference_mode(False), torch.no_grad():
            self._prepare(settings)
            losses, slopes = self._evaluate(closure, step, settings)
            self._last_losses, loss = tuple(losses), sum(losses) / len(losses)
            finite = all(math.isfinite(value) for value in slopes)
            if not finite and self._on_nonfinite == "raise":
                self._refuse(step, settings, losses, slopes)
            log.append(slopes if finite else [math.nan] * len(slopes), settings)
            self._moves.finish(step)
            self._versions = versions(self._weights)
            if self._ranks is not None and self._check_every and (step + 1) % self._check_every == 0:
                self._ranks.check_same_weights(self._weights, step)
        self._projected_grad = sum(slopes) / len(slopes) if finite else math.nan
        if finite:
            self._watch.after(step, loss, slopes)
        return loss

    def _prepare(self, settings: Settings) -> None:
        """Looks at the parameters before a step: what was frozen, moved or cast since the last one."""
        if self.log.base is None:
            self._weights = self._weigh()
            self._start(self.log)
            self.log.base = base_of(self._weights)
            self._watch.resolution(self._weights, self.log.rule, settings, self._backend)
            return
        if [p.requires_grad for p in self._weights.all_tensors] != self._weights.flags:
            raise RuntimeError(
                "requires_grad of a parameter changed after the first step: make a new optimizer, whose log "
                "starts there"
            )
        self._check_unchanged()
        if moved(self._weights):
            fresh = self._weigh()
            if fresh.table != self._weights.table:
                raise RuntimeError(
                    "the dtype or shape of a parameter changed after the first step: make a new optimizer"
                )
            self._weights, self._moves = fresh, Moves(fresh, self.log, self._backend)

    def _evaluate(self, closure: Closure, step: int, settings: Settings) -> tuple[list[float], list[float]]:
        """The losses of this rank's draws, and the slopes of all draws that the step goes on with."""
        split = self._ranks is not None and self._split == "directions"
        first = self._ranks.rank * self._n if self._ranks is not None and split else 0
        values: list[Tensor | float] = []
        moves, self._stepping = 0, True
        try:
            for draw in range(first, first + self._n):
                for sign in (1.0, -1.0):
                    self._moves.visit(step, draw, sign, settings)
                    moves += 1
                    watched = self._debug
                    values.append(checked_call(closure, self._weights) if watched else scalar_of(closure()))
            # Read at once: the device is waited for once in a step.
            losses = [float(value) for value in values]
            halves = [(a - b) / 2 for a, b in zip(losses[0::2], losses[1::2], strict=True)]
            if self._ranks is not None:
                halves = self._ranks.combine(halves, self._split)
            return losses, [single(half / settings.groups[0].eps) for half in halves]
        except BaseException:
            # A keyboard interrupt, too: the weights go back before it goes on its way.
            self._retreat(step, moves, settings)
            raise
        finally:
            self._stepping = False

    def _retreat(self, step: int, moves: int, settings: Settings) -> None:
        """Puts the weights back after an attempt. In place that leaves rounding behind: the log notes it."""
        if moves:
            self._moves.back()
            if not self._moves.exact:
                self.log.retreats.append(Retreat(step, moves, settings))
        self._versions = versions(self._weights)

    def _refuse(self, step: int, settings: Settings, losses: list[float], slopes: list[float]) -> None:
        self._retreat(step, 2 * self._n, settings)
        self._projected_grad = math.nan
        bad = next((value for value in [*losses, *slopes] if not math.isfinite(value)), math.nan)
        raise FloatingPointError(
            f"step {step}: the closure returned {bad} (losses {', '.join(f'{v:.6g}' for v in losses[:8])}; "
            f"projected gradient {slopes[0]:.6g}); the parameters were restored and no update was made. Lower "
            "lr or eps, compute the loss in float32, or pass on_nonfinite='skip'"
        )

    # ---- the centre

    def _check_unchanged(self) -> None:
        """Between the steps of a pipelined run the weights stand off the centre: nobody may write to them."""
        if self._moves.away and (moved(self._weights) or versions(self._weights) != self._versions):
            raise RuntimeError(
                "the parameters were changed while a pipelined step had left them perturbed: call flush() "
                "before loading or moving weights"
            )

    @torch.no_grad()
    def flush(self) -> None:
        """Puts the parameters at the centre point. A no-op unless a pipelined step left them perturbed."""
        if self._moves.away:
            self._check_unchanged()
            with torch.inference_mode(False):
                self._moves.back()
            self.log.flushes.append(len(self.log))
            self._versions = versions(self._weights)

    @contextlib.contextmanager
    def parameters_at_center(self) -> Iterator[None]:
        """A context in which the parameters are those of the last step: to evaluate in a pipelined run."""
        self.flush()
        yield

    def attach(self, model: nn.Module) -> list[Any]:
        """For pipelined runs: flushes before `model` is called outside a step and before its state_dict().

        Returns the handles of the two hooks; .remove() takes them off.
        """

        def at_call(module: nn.Module, args: Any) -> None:
            if not self._stepping:
                self.flush()

        def at_state(module: nn.Module, prefix: str, keep_vars: bool) -> None:
            self.flush()

        return [model.register_forward_pre_hook(at_call), model.register_state_dict_pre_hook(at_state)]

    # ---- saving and resuming

    def state_dict(self) -> dict[str, Any]:
        """Groups and log, after a flush. A run that goes on from it takes the same steps, bit for bit."""
        self.flush()
        return {**super().state_dict(), "mezo": packed(self.log, self._n)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a saved run: groups, n, the log, and with it seed, dist, mode, momentum and betas.

        The model's weights of the same moment are to be loaded beside it. Raises ValueError if the state is
        not MeZO's or belongs to other parameters.
        """
        log, n = unpacked(state_dict, self._weights.table)
        super().load_state_dict(state_dict)
        self._n = n
        self._weights = self._weigh()
        self._start(log)
        self._projected_grad = log[-1].projected_grad if len(log) else math.nan

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a MeZO optimizer cannot be copied or pickled: use state_dict() and load_state_dict()"
        )
