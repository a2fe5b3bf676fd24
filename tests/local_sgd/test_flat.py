"""The flat vector: what lies where, notes that survive a sum in every dtype, fingerprints that see every bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from papercore.local_sgd.agreement import Whereabouts, check_same_place, fingerprint
from papercore.local_sgd.flat import FlatVector, FlatVectors, layout_of

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def tensors(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 2), (), (4,), (2, 3, 4, 4)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_and_unpacking_gives_the_tensors_back(dtype: torch.dtype) -> None:
    given = tensors(dtype)
    given[3] = given[3].to(memory_format=torch.channels_last)
    flat = FlatVector(layout_of(given))
    flat.pack(given)
    assert torch.equal(flat.payload, torch.cat([t.reshape(-1) for t in given]))
    assert flat.numel == 6 + 1 + 4 + 96 and flat.nbytes == 107 * given[0].element_size()
    back = [torch.zeros_like(t) for t in given]
    flat.unpack(back)
    assert all(torch.equal(a, b) for a, b in zip(given, back, strict=True))
    assert back[3].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_notes_survive_a_sum_over_ranks_in_every_dtype(dtype: torch.dtype, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 5))
    word = st.integers(0, 2**64 - 1)
    words = [data.draw(st.lists(word, min_size=3, max_size=3)) for _ in range(size)]
    layout = layout_of([torch.zeros(2, dtype=dtype)])
    vectors = [FlatVector(layout, notes=3, size=size) for _ in range(size)]
    for rank, vector in enumerate(vectors):
        vector.pack([torch.full((2,), float("nan"), dtype=dtype)])
        vector.write_notes(rank, words[rank])
    total = vectors[0]
    for other in vectors[1:]:
        total.vector += other.vector
    assert total.read_notes() == words
    assert total.payload.isnan().all() and total.note_bytes == 3 * 8 * size * total.vector.element_size()


def test_one_vector_a_dtype_with_the_notes_in_the_first() -> None:
    mixed = [
        torch.ones(2),
        torch.ones(3, dtype=torch.float64),
        torch.ones(4),
        torch.ones(1, dtype=torch.bfloat16),
    ]
    flat = FlatVectors(layout_of(mixed), notes=2, size=3)
    assert flat.places == [[0, 2], [1], [3]]
    assert [v.vector.numel() for v in flat.vectors] == [6 + 2 * 8 * 3, 3, 1]
    assert flat.nbytes == 6 * 4 + 3 * 8 + 2 and flat.note_bytes == 48 * 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fingerprint_sees_every_bit_and_the_order(dtype: torch.dtype) -> None:
    given = tensors(dtype)
    whole = {torch.float64: torch.int64, torch.float32: torch.int32}.get(dtype, torch.int16)
    seen = {fingerprint(given)}
    assert fingerprint([t.clone() for t in given]) in seen
    bits = 8 * given[0].element_size()
    for place in range(6):
        for bit in range(bits):
            changed = [t.clone() for t in given]
            value = 1 << bit if bit < bits - 1 else -(1 << bit)
            changed[0].view(-1).view(whole)[place] ^= value
            seen.add(fingerprint(changed))
    assert len(seen) == 6 * bits + 1
    swapped = given[0].clone()
    swapped[0, 0], swapped[2, 1] = given[0][2, 1].clone(), given[0][0, 0].clone()
    seen |= {fingerprint([swapped, *given[1:]]), fingerprint([given[2], given[1], given[0], given[3]])}
    assert len(seen) == 6 * bits + 3
    zeros, minus = torch.zeros(3, dtype=dtype), -torch.zeros(3, dtype=dtype)
    assert fingerprint([zeros]) != fingerprint([minus])
    assert min(seen) >= -(2**63) and max(seen) < 2**63


def test_a_fingerprint_of_a_long_tensor_sees_its_end() -> None:
    long = torch.zeros((1 << 20) + 5)
    first = fingerprint([long])
    long[-1] = 1e-30
    assert fingerprint([long]) != first


def test_whereabouts_keep_every_bit_of_the_rate() -> None:
    place = Whereabouts.of(0, 7, 3, 4, 0.1 + 0.2, layout=5, state=6)
    assert place.lr == 0.1 + 0.2 and Whereabouts(*place.words) == place
    check_same_place([place, place])
    other = Whereabouts.of(0, 7, 3, 4, 0.3, layout=5, state=6)
    with pytest.raises(
        RuntimeError, match=r"ranks 0, 1, 2, 3, 4, 5, 6, 7, \.\.\.: the end of a round after step 7"
    ):
        check_same_place([place] * 9 + [other])
