"""The closed forms against the paper's table 22 and figure 4; the memory of a step as the profiler counts it."""

import copy

import pytest
import torch
from torch import nn

from papercore.mezo import (
    MeZO,
    checkpoint_bytes,
    decoder_parameters,
    devices_needed,
    lora_parameters,
    memory_model,
    prefix_parameters,
)
from papercore.mezo.memory import GIB
from papercore.mezo.weights import CHUNK

SHAPES = {  # layers, width
    "1.3B": (24, 2048),
    "2.7B": (32, 2560),
    "6.7B": (32, 4096),
    "13B": (40, 5120),
    "30B": (48, 7168),
    "66B": (64, 9216),
    "175B": (96, 12288),
}
OPT = {name: decoder_parameters(*shape) for name, shape in SHAPES.items()}


def test_parameter_counts_of_opt() -> None:
    """A brute-force count: the model built on the meta device with torch's own layers."""
    layers, width = 3, 64
    with torch.device("meta"):
        block = nn.TransformerEncoderLayer(width, 4, 4 * width)
        parts = [nn.Embedding(50272, width), nn.Embedding(2050, width), nn.LayerNorm(width)]
        total = layers * sum(p.numel() for p in block.parameters())
    total += sum(p.numel() for part in parts for p in part.parameters())
    assert decoder_parameters(layers, width) == total
    assert OPT["13B"] == 12_853_473_280 and OPT["175B"] == 174_604_468_224


def test_adapters_and_checkpoints() -> None:
    assert lora_parameters(64, 9216) == 18_874_368 and prefix_parameters(64, 9216) == 5_898_240
    # 38 MB and 12 MB in section 2.1 of the paper; the log below 0.1 MB
    assert checkpoint_bytes("lora", trainable=lora_parameters(64, 9216)) == pytest.approx(38e6, rel=0.01)
    assert checkpoint_bytes("prefix", trainable=prefix_parameters(64, 9216)) == pytest.approx(12e6, rel=0.02)
    assert checkpoint_bytes("mezo", steps=20_000) < 100_000
    assert checkpoint_bytes("adam", n_params=OPT["66B"]) == 2 * OPT["66B"]


# MultiRC, about 400 tokens, batch of 1 a device; GB as the paper prints them (table 22). One-device cells.
MEZO_GB = {"1.3B": 4, "2.7B": 7, "6.7B": 14, "13B": 26, "30B": 58}
ADAM_GB = {"1.3B": 27, "2.7B": 55, "6.7B": 156, "13B": 316, "30B": 633}


@pytest.mark.parametrize("name", MEZO_GB)
def test_memory_of_mezo_is_the_papers_within_a_gigabyte(name: str) -> None:
    assert memory_model(OPT[name], "mezo", overhead_bytes=2 * GIB) / GIB == pytest.approx(
        MEZO_GB[name], abs=0.6
    )


@pytest.mark.parametrize("name", ADAM_GB)
def test_memory_of_adam_is_a_floor_of_the_papers(name: str) -> None:
    ratio = ADAM_GB[name] / (memory_model(OPT[name], "adam") / GIB)
    assert 1.38 <= round(ratio, 2) <= 1.66


def test_largest_model_on_so_many_devices() -> None:
    """Figure 4: devices of 80 GB, 2 of them taken by the context where weights alone are read."""

    def largest(method: str, devices: int) -> str:
        fits = [
            name
            for name, count in OPT.items()
            if devices_needed(memory_model(count, method), overhead_gib=2.0 if method == "mezo" else 0.0)
            <= devices
        ]
        return fits[-1]

    assert [largest("adam", k) for k in (1, 2, 4, 8)] == ["2.7B", "6.7B", "13B", "30B"]
    assert [largest("mezo", k) for k in (1, 2, 4)] == ["30B", "66B", "66B"]
    assert largest("mezo", 8) == "175B"  # the paper marks this one as projected


def test_exact_mode_adds_a_copy_of_what_is_trained() -> None:
    count = OPT["13B"]
    assert memory_model(count, "mezo", exact=True) == 2 * memory_model(count, "mezo")
    assert (
        memory_model(count, "mezo", exact=True, trainable=1000) == memory_model(count, "mezo") + 4000
    )  # the adapter and its copy
    assert memory_model(count, "lora", trainable=1000) == memory_model(count, "inference") + 16_000
    assert memory_model(10, "mezo", activation_bytes=7) == 27


# ---- what a step allocates -----------------------------------------------------------------------------------------


def peak(run) -> int:
    """Highest sum of the bytes allocated and not yet freed, over the profiler's allocation events."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    now = high = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events, "the profiler saw no allocation"
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        high = max(high, now)
    return high


SETTINGS = [
    # Chunks of float32 that a step may hold beyond a forward: the compiled loops make the noise in registers;
    # plain torch works on the words of one chunk; Adam has the moments of a chunk besides.
    ("numba", {"dist": "gaussian"}, 0.1),
    ("numba", {"dist": "rademacher", "momentum": 0.9}, 0.1),
    ("numba", {"dist": "gaussian", "pipelined": True, "n": 2}, 0.1),
    ("numba", {"dist": "gaussian", "betas": (0.9, 0.99)}, 7),
    ("torch", {"dist": "gaussian"}, 6),
    ("torch", {"dist": "rademacher"}, 6),
    ("torch", {"dist": "gaussian", "betas": (0.9, 0.99)}, 10),
]


@pytest.mark.parametrize(("backend", "options", "chunks"), SETTINGS, ids=str)
def test_a_step_takes_chunks_beyond_the_forward(backend: str, options: dict, chunks: float) -> None:
    """No tensor of the size of the model, nor of its largest matrix (15 MB here), is made."""
    if backend == "numba":
        pytest.importorskip("numba")
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 7400, bias=False))
    x = torch.ones(2, 512)

    def loss() -> torch.Tensor:
        return model(x).square().mean()

    def forward() -> None:
        with torch.no_grad():
            loss()

    forward_bytes = peak(forward)
    optimizer = MeZO(model.parameters(), 1e-4, 1e-3, backend=backend, **options)
    optimizer.step(loss)
    assert peak(lambda: optimizer.step(loss)) <= forward_bytes + chunks * 4 * CHUNK


def test_exact_mode_keeps_one_copy() -> None:
    model = nn.Linear(1024, 1024)
    optimizer = MeZO(model.parameters(), 1e-4, mode="exact")
    weights = 4 * 1024 * 1025
    assert optimizer.extra_nbytes == weights
    assert (
        weights
        <= peak(lambda: optimizer.step(lambda: model(torch.ones(1, 1024)).mean()))
        <= weights + 64 * CHUNK
    )


def test_backpropagation_with_adam_takes_four_times_the_weights() -> None:
    """The comparison: gradients and two moments beside the weights, in float32."""
    model = nn.Linear(1024, 1024)
    mine = copy.deepcopy(model)
    adam = torch.optim.Adam(model.parameters(), 1e-4, foreach=False)

    def step() -> None:
        adam.zero_grad()
        model(torch.ones(1, 1024)).mean().backward()
        adam.step()

    weights = 4 * 1024 * 1025
    assert peak(step) >= 3 * weights
    optimizer = MeZO(mine.parameters(), 1e-4)
    optimizer.step(lambda: mine(torch.ones(1, 1024)).mean())
    chunked = peak(lambda: optimizer.step(lambda: mine(torch.ones(1, 1024)).mean()))
    assert chunked < 64 * CHUNK
