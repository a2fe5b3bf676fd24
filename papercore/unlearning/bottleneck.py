"""The discrete key-value bottleneck: frozen keys, trainable values, and a mask of pairs that are never fetched.

    h_c    = R_c^T z                                               head of codebook c
    j_c(z) = argmin over the pairs that are not masked of ||h_c - k_cj||
    f(z)   = (1/C) sum_c v_{c, j_c(z)}                             a decoder without parameters; tokens are averaged too

(Traeuble et al., 2023, section 3; Shah et al., 2023, arXiv 2311.15268, section 3.) Masking key k_cj sends every later input to its
next nearest key. A mask takes nothing away: keys and values stay stored, and `unmask` restores the outputs to the bit. `erase`
overwrites what is masked and `compact` drops it. None of this touches the backbone, which still encodes what it always did.

Glossary
    dim, num_codebooks, num_pairs   D, C, K
    dim_key, dim_value              d_k, d_v
    projection     R        [C, D, d_k]     float, fixed (None for "chunk" and "none")
    keys           k        [C, K, d_k]     float, fixed once `init_keys` has run
    values         v        [C, K, d_v]     the one parameter; starts at 0, "no vote"
    mask                    [C, K]          bool, True = never fetched
    erased                  [C, K]          bool, True = masked for good: key and value are gone

Different from the papers' code: a codebook whose pairs are all masked is an error or abstains, where an argmax over -infinity
would fetch pair 0; keys cannot move once values depend on them; every change of the mask is logged.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from papercore.unlearning.arguments import (
    Examples,
    batches,
    check_choice,
    check_features,
    check_generator,
    check_integer,
    check_number,
    check_pairs,
    gather,
)
from papercore.unlearning.audit import AuditLog
from papercore.unlearning.key_learning import MovingAverage
from papercore.unlearning.projection import make_projection
from papercore.unlearning.search import nearest_keys, search_table

__all__ = ["KeyValueBottleneck", "count_usage"]


def count_usage(indices: Tensor, num_pairs: int) -> Tensor:
    """How often each pair was fetched: LongTensor [C, K] from indices [..., C] as `lookup` returns them (-1 is skipped).

    >>> count_usage(torch.tensor([[0, 2], [1, 2]]), 3).tolist()
    [[1, 1, 0], [0, 0, 2]]
    """
    rows = indices.reshape(-1, indices.shape[-1]).long()
    codebooks = rows.shape[1]
    flat = rows + torch.arange(codebooks, device=rows.device) * num_pairs
    counts = torch.bincount(flat[rows >= 0], minlength=codebooks * num_pairs)
    return counts.view(codebooks, num_pairs)


class KeyValueBottleneck(nn.Module):
    """C codebooks of K key-value pairs between a frozen backbone and the logits.

    Args:
        dim: features of the backbone, D.
        num_codebooks, num_pairs: C and K.
        dim_key: d_k.
        dim_value: d_v: the number of classes, unless a decoder follows.
        seed: of the projections and, by default, of `init_keys`; None is 0.
        projection: "random", "chunk" or "none" (projection.py).
        abstain: a codebook whose pairs are all masked leaves the mean to the others, instead of being an error.
        block: scores that the search holds at a time; default: what suits the device.

    Raises:
        ValueError: a size below 1, or sizes that do not fit the projection.
        TypeError: a size that is no integer.

    >>> features = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    >>> model = KeyValueBottleneck(16, 8, 20, dim_key=4, dim_value=3, seed=1).init_keys(features)
    >>> model(features).shape, model.lookup(features).shape, int(model.usage(features).sum())
    (torch.Size([200, 3]), torch.Size([200, 8]), 1600)
    """

    projection: Tensor | None
    keys: Tensor
    mask: Tensor
    erased: Tensor

    def __init__(
        self,
        dim: int,
        num_codebooks: int = 256,
        num_pairs: int = 4096,
        *,
        dim_key: int = 14,
        dim_value: int,
        seed: int | None = None,
        projection: str = "random",
        abstain: bool = False,
        block: int | None = None,
    ) -> None:
        super().__init__()
        self.dim = check_integer("dim", dim)
        self.num_codebooks = check_integer("num_codebooks", num_codebooks)
        self.num_pairs = check_integer("num_pairs", num_pairs)
        self.dim_key = check_integer("dim_key", dim_key)
        self.dim_value = check_integer("dim_value", dim_value)
        self.seed = 0 if seed is None else check_integer("seed", seed, least=0)
        self.projection_kind = projection
        self.abstain = bool(abstain)
        self.block = None if block is None else check_integer("block", block)
        shape = (self.num_codebooks, self.num_pairs)
        generator = torch.Generator().manual_seed(self.seed)
        self.register_buffer(
            "projection", make_projection(projection, self.dim, self.num_codebooks, self.dim_key, generator)
        )
        self.register_buffer("keys", torch.zeros(*shape, self.dim_key))
        self.register_buffer("mask", torch.zeros(shape, dtype=torch.bool))
        self.register_buffer("erased", torch.zeros(shape, dtype=torch.bool))
        self.values = nn.Parameter(torch.zeros(*shape, self.dim_value))
        self.keys_ready = False
        self.audit = AuditLog()
        self._tables: dict[bool, tuple[Any, ...]] = {}

    # ---- keys ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_keys(
        self,
        features: Examples,
        *,
        epochs: int = 10,
        batch_size: int = 256,
        decay: float = 0.95,
        dead_threshold: float = 0.1,
        start: str = "data",
        generator: torch.Generator | None = None,
    ) -> KeyValueBottleneck:
        """Places the keys by vector quantisation of features, without labels, and freezes them (key_learning.py).

        Args:
            features: [N, dim] or [N, T, dim], or a DataLoader of such batches (labels are ignored); another data set will do.
            epochs, batch_size: passes and examples a step.
            decay, dead_threshold: g, and the share of a fair share below which a key is put back among the data.
            start: "data": at heads of random examples; "normal": N(0, 1), as in the papers' code.
            generator: of the order, the start and the replacements; default: seeded with the module's seed.

        Returns:
            self.

        Raises:
            ValueError: no features, NaN or infinity among them, or another width than dim.
            RuntimeError: values were trained or pairs masked with the present keys.
        """
        check_integer("epochs", epochs)
        check_integer("batch_size", batch_size)
        check_number("decay", decay, least=0.0, most=1.0)
        check_number("dead_threshold", dead_threshold, least=0.0)
        check_choice("start", start, ("data", "normal"))
        if self.keys_ready and (bool(self.values.any()) or bool(self.mask.any())):
            raise RuntimeError(
                "the keys are frozen: values were trained, or pairs masked, with them. Make a new KeyValueBottleneck for new keys."
            )
        inputs, _ = gather("features", features)
        check_features("features", inputs, self.dim)
        draw = (
            torch.Generator().manual_seed(self.seed + 1) if generator is None else check_generator(generator)
        )
        inputs = inputs.to(self.keys.device)
        if start == "normal":
            first = torch.randn(self.keys.shape, generator=draw).to(inputs.device, self._exact)
        else:
            count = len(inputs)
            order = torch.cat(
                [torch.randperm(count, generator=draw) for _ in range(-(-self.num_pairs // count))]
            )
            some = self._heads(inputs[order[: self.num_pairs].to(inputs.device)])
            tokens = len(some) // self.num_pairs
            first = (
                some.view(self.num_pairs, tokens, self.num_codebooks, -1)[:, 0].transpose(0, 1).contiguous()
            )
        learner = MovingAverage(first, decay=decay, dead_threshold=dead_threshold)
        for _ in range(epochs):
            order = torch.randperm(len(inputs), generator=draw).to(inputs.device)
            for chosen in order.split(batch_size):
                learner.step(self._heads(inputs[chosen]), draw)
        self.keys.copy_(learner.keys)
        self.keys_ready = True
        return self

    # ---- reading ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def lookup(self, z: Tensor, *, ignore_mask: bool = False) -> Tensor:
        """Nearest pair in every codebook: LongTensor [B, C], or [B, T, C] for features [B, T, dim].

        Masked pairs are never fetched; with ignore_mask=True those that were not erased are, as before any mask. -1 stands
        for a codebook that abstains. The search runs in float32 (float64 for float64 keys) whatever autocast says: in half precision
        near ties would go to other keys.

        Raises:
            RuntimeError: before `init_keys`.
            ValueError: another width than dim, NaN or infinity.
        """
        self._need_keys()
        check_features("features", z, self.dim)
        hidden = self.erased if ignore_mask else self.mask
        table, mean, weight, bias = self._table(ignore_mask)
        with torch.autocast(device_type=z.device.type, enabled=False):
            if weight is None or bias is None:
                heads = self._heads(z) - mean
                heads = torch.cat([heads, heads.new_ones(*heads.shape[:2], 1)], -1)
            else:
                rows = z.detach().reshape(-1, self.dim).to(weight.dtype)
                heads = torch.addmm(bias, rows, weight).view(-1, self.num_codebooks, self.dim_key + 1)
            found = nearest_keys(heads, table, block=self.block)
        if self.abstain or ignore_mask:
            found = found.masked_fill(hidden.all(1), -1)
        return found.reshape(*z.shape[:-1], self.num_codebooks)

    def read(self, indices: Tensor) -> Tensor:
        """Mean value of the pairs `indices` [B, C] or [B, T, C]: [B, dim_value]. Gradients reach the fetched values alone."""
        if indices.dim() not in (2, 3) or indices.shape[-1] != self.num_codebooks:
            raise ValueError(
                f"indices has the shape {tuple(indices.shape)}, expected [B, {self.num_codebooks}] or [B, T, {self.num_codebooks}], "
                "as lookup returns them"
            )
        books = torch.arange(self.num_codebooks, device=indices.device)
        if bool((indices < 0).any()):
            # A codebook abstains for all inputs or for none.
            books = (indices >= 0).flatten(0, -2).all(0).nonzero().flatten()
            indices = indices[..., books]
            if len(books) == 0:
                raise ValueError("every codebook abstains: all pairs are masked")
        flat = indices.long() + books * self.num_pairs
        # The mean over a bag of T * C pairs is the mean over tokens and codebooks.
        return functional.embedding_bag(flat.flatten(1), self.values.flatten(0, 1), mode="mean")

    def forward(self, z: Tensor) -> Tensor:
        """Logits [B, dim_value] for features [B, dim] or [B, T, dim]; errors as for `lookup`."""
        return self.read(self.lookup(z))

    @torch.no_grad()
    def usage(self, z: Examples, *, ignore_mask: bool = False) -> Tensor:
        """How often each pair is fetched: LongTensor [C, K], for features, a pair (features, labels) or a DataLoader.

        Sums to examples x codebooks (x tokens).
        """
        total = torch.zeros(self.mask.shape, dtype=torch.long, device=self.mask.device)
        for inputs, _ in batches("features", z):
            found = self.lookup(inputs.to(self.keys.device), ignore_mask=ignore_mask)
            total += count_usage(found, self.num_pairs)
        return total

    # ---- masking ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def mask_pairs(self, pairs: Tensor, *, by: str = "mask_pairs", subject: str = "") -> Tensor:
        """Never fetch `pairs`, BoolTensor [C, K], again; adds to earlier masks and to the audit log.

        Returns:
            BoolTensor [C, K] of the pairs that were not masked before.

        Raises:
            ValueError: another shape; a codebook would have no pair left (unless abstain=True), or no codebook would.
            TypeError: not a BoolTensor.
        """
        pairs = check_pairs("pairs", pairs, (self.num_codebooks, self.num_pairs)).to(self.mask.device)
        empty = (self.mask | pairs).all(1)
        if bool(empty.any()) and (not self.abstain or bool(empty.all())):
            which = empty.nonzero().flatten().tolist()
            cure = "" if self.abstain else ", or make the bottleneck with abstain=True"
            raise ValueError(
                f"the mask would leave no pair in {len(which)} of {self.num_codebooks} codebooks (the first is {which[0]}): mask fewer pairs{cure}"
            )
        fresh = pairs & ~self.mask
        self.mask |= pairs
        self.audit.add("mask", fresh, int(self.mask.sum()), by=by, subject=subject)
        return fresh

    @torch.no_grad()
    def unmask(self, pairs: Tensor | None = None, *, by: str = "unmask", subject: str = "") -> Tensor:
        """Takes the mask off `pairs` (default: all), so that they are fetched as before; what was erased stays away.

        Returns:
            BoolTensor [C, K] of the pairs that can be fetched again.
        """
        shape = (self.num_codebooks, self.num_pairs)
        asked = (
            torch.ones_like(self.mask)
            if pairs is None
            else check_pairs("pairs", pairs, shape).to(self.mask.device)
        )
        if pairs is not None and bool((asked & self.erased).any()):
            raise ValueError(
                f"{int((asked & self.erased).sum()):,} of these pairs were erased: keys and values are gone, nothing can be unmasked"
            )
        back = asked & self.mask & ~self.erased
        self.mask &= ~back
        self.audit.add("unmask", back, int(self.mask.sum()), by=by, subject=subject)
        return back

    @torch.no_grad()
    def erase(self, *, by: str = "erase", subject: str = "") -> Tensor:
        """Overwrites keys and values of all masked pairs with zeros. Cannot be undone; outputs do not change.

        Other copies (checkpoints, the optimiser's state) and the backbone keep what they know.

        Returns:
            BoolTensor [C, K] of the pairs that were erased now.
        """
        fresh = self.mask & ~self.erased
        self.keys[fresh] = 0.0
        self.values[fresh] = 0.0
        self.erased |= fresh
        self.audit.add("erase", fresh, int(self.mask.sum()), by=by, subject=subject)
        return fresh

    @torch.no_grad()
    def compact(self, *, by: str = "compact", subject: str = "") -> Tensor:
        """Drops all masked pairs: less memory, a faster search, the same outputs. Cannot be undone.

        num_pairs becomes the largest number of pairs left in a codebook; other codebooks are filled up with erased pairs.
        `values` is a new parameter: make a new optimiser.

        Returns:
            LongTensor [C, new num_pairs]: the earlier index of each pair, -1 where a codebook was filled up.
        """
        fresh = self.mask & ~self.erased
        left = int((~self.mask).sum(1).max())
        # A stable sort puts the pairs that stay first, in their order, so that ties still go to the same pair.
        order = self.mask.to(torch.uint8).argsort(dim=1, stable=True)[:, :left]
        gone = self.mask.gather(1, order)
        chosen = order.unsqueeze(-1)
        self.keys = self.keys.gather(1, chosen.expand(-1, -1, self.dim_key)).masked_fill(
            gone.unsqueeze(-1), 0.0
        )
        kept = self.values.gather(1, chosen.expand(-1, -1, self.dim_value)).masked_fill(
            gone.unsqueeze(-1), 0.0
        )
        self.values = nn.Parameter(kept, requires_grad=self.values.requires_grad)
        self.mask, self.erased, self.num_pairs = gone, gone.clone(), left
        self.audit.add("compact", fresh, int(gone.sum()), by=by, subject=subject)
        return order.masked_fill(gone, -1)

    @property
    def status(self) -> str:
        """What may be said of this bottleneck: pairs masked and erased, and what that does not mean."""
        masked = int((self.mask & ~self.erased).sum())
        erased = sum(entry.pairs for entry in self.audit if entry.action in ("erase", "compact"))
        total = self.num_codebooks * self.num_pairs
        if not masked and not erased:
            return f"no pair of {total:,} is masked"
        parts = []
        if masked:
            parts.append(
                f"{masked:,} of {total:,} pairs are masked: their votes are suppressed, but keys and values are still stored and unmask() restores them"
            )
        if erased:
            parts.append(f"{erased:,} pairs were erased from this module")
        return "; ".join(parts) + ". The backbone is unchanged and may still encode what was forgotten."

    # ---- inside -------------------------------------------------------------------------------------------------------

    @property
    def _exact(self) -> torch.dtype:
        return torch.float64 if self.keys.dtype == torch.float64 else torch.float32

    def _heads(self, z: Tensor) -> Tensor:
        """[B * T, C, d_k] in the search's dtype."""
        rows = z.detach().reshape(-1, self.dim).to(self._exact)
        if self.projection_kind == "chunk":
            return rows.view(-1, self.num_codebooks, self.dim_key)
        if self.projection is None:
            return rows.unsqueeze(1).expand(-1, self.num_codebooks, -1)
        flat = self.projection.to(self._exact).transpose(0, 1).reshape(self.dim, -1)
        return (rows @ flat).view(-1, self.num_codebooks, self.dim_key)

    def _table(self, ignore_mask: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The search table, mean keys, and the projection with the mean and a last component 1 built in.

        Made again only after keys, mask or projection have changed.
        """
        hidden = self.erased if ignore_mask else self.mask
        sources = (self.keys, hidden) if self.projection is None else (self.keys, hidden, self.projection)
        versions = None if any(s.is_inference() for s in sources) else tuple(s._version for s in sources)
        held = self._tables.get(ignore_mask)
        unchanged = held is not None and versions is not None and held[1] == versions
        if held is not None and unchanged and all(a is b for a, b in zip(held[0], sources, strict=True)):
            return held[2]
        table, mean = search_table(self.keys, hidden)
        made: tuple[Tensor, Tensor, Tensor | None, Tensor | None] = (table, mean, None, None)
        if self.projection is not None:
            weight = (
                functional.pad(self.projection.to(mean.dtype), (0, 1)).transpose(0, 1).reshape(self.dim, -1)
            )
            made = (table, mean, weight, functional.pad(-mean, (0, 1), value=1.0).flatten())
        self._tables[ignore_mask] = (sources, versions, made)
        return made

    def _need_keys(self) -> None:
        if not self.keys_ready:
            raise RuntimeError(
                "the keys have no place yet: call init_keys(features) first, or load a state dict"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> KeyValueBottleneck:
        self._tables = {}
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_tables": {}}

    def get_extra_state(self) -> Tensor:
        """Whether the keys are ready, and the audit log: JSON as bytes, a tensor, so that safetensors can hold it too."""
        text = json.dumps({"keys_ready": self.keys_ready, "audit": self.audit.to_json()})
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        try:
            content = json.loads(bytes(state.tolist()).decode())
            ready, log = bool(content["keys_ready"]), AuditLog.from_json(content["audit"])
        except (AttributeError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"not the state of a KeyValueBottleneck, or damaged ({error})") from None
        self.keys_ready, self.audit = ready, log

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_codebooks={self.num_codebooks}, num_pairs={self.num_pairs}, dim_key={self.dim_key}, "
            f"dim_value={self.dim_value}, projection={self.projection_kind!r}, masked={int(self.mask.sum())}"
        )
