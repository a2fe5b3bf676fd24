"""The Triton kernel without a GPU: its arithmetic in Triton's interpreter, its code by Triton's compiler.

The interpreter is chosen when a kernel is defined, for the whole process. So the tests of the first part run in a process
of their own, which the second part starts: with TRITON_INTERPRET=1 this file is the first part, without it the second.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import accumulate
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
import triton.language as tl

from papercore.mezo import philox
from papercore.mezo.noise import MissingBackend, add_noise_, noise, resolve_backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = Path(__file__)
DISTS = ["gaussian", "rademacher"]
SEED = 0x7EDCBA9876543210


if INTERPRETED:
    _triton = importlib.import_module("papercore.mezo._triton")

    @triton.jit
    def randint_kernel(out, seed, offset, n: tl.constexpr):
        """Triton's own generator: words [4, n] of the counters offset .. offset + n - 1."""
        i = tl.arange(0, n)
        w0, w1, w2, w3 = tl.randint4x(seed, offset + i)
        tl.store(out + i, w0.to(tl.int32, bitcast=True))
        tl.store(out + n + i, w1.to(tl.int32, bitcast=True))
        tl.store(out + 2 * n + i, w2.to(tl.int32, bitcast=True))
        tl.store(out + 3 * n + i, w3.to(tl.int32, bitcast=True))

    @triton.jit
    def philox_kernel(out, seed, counter):
        """Triton's Philox at one counter, int32 [4]."""
        one = tl.arange(0, 1)
        c0 = tl.load(counter + one).to(tl.uint32, bitcast=True)
        c1 = tl.load(counter + 1 + one).to(tl.uint32, bitcast=True)
        c2 = tl.load(counter + 2 + one).to(tl.uint32, bitcast=True)
        c3 = tl.load(counter + 3 + one).to(tl.uint32, bitcast=True)
        words = tl.philox(seed, c0, c1, c2, c3)
        for j in tl.static_range(4):
            tl.store(out + j + one, words[j].to(tl.int32, bitcast=True))

    def unsigned(words):
        return words.to(torch.int64) & 0xFFFFFFFF

    def test_our_philox_is_tritons_philox():
        out = torch.zeros(4, dtype=torch.int32)
        for counter, seed in (((0, 0, 0, 0), 0), ((1, 2, 3, 4), SEED), ((2**32 - 1, 7, 1, 0), 2**63 - 1)):
            philox_kernel[(1,)](out, seed, torch.tensor(counter).to(torch.int32))
            words = philox.philox4x32(torch.tensor(counter).view(4, 1), philox.split_words(seed))
            assert torch.equal(unsigned(out), words.view(-1)), (counter, seed)

    def test_gaussian_noise_reads_the_words_of_tritons_randint4x():
        out = torch.zeros(4, 64, dtype=torch.int32)
        randint_kernel[(1,)](out, SEED, 1000, 64)
        multiplied, passed = philox._block_words(
            SEED, 1000, 64, philox.STREAMS["gaussian"], torch.device("cpu")
        )
        ours = torch.stack((multiplied[0], passed[0], multiplied[1], passed[1])) & 0xFFFFFFFF
        assert torch.equal(unsigned(out), ours)

    def test_auto_stays_with_the_cpu_and_triton_can_be_asked_for():
        assert resolve_backend("auto", "cpu") in ("numba", "torch")
        assert resolve_backend("triton", "cpu") == "triton"

    @pytest.mark.parametrize("dist", DISTS)
    @pytest.mark.parametrize("start", [0, 3, 16, 100, 2**32 - 5, 2**40 + 1, 2**63 - 5000])
    @pytest.mark.parametrize("numel", [1, 4999])
    def test_same_bits_as_torch_for_a_slice(dist, start, numel):
        ours, theirs = torch.zeros(numel), torch.zeros(numel)
        add_noise_([ours], [start], [(SEED + start, 1.0)], dist=dist, backend="triton")
        add_noise_([theirs], [start], [(SEED + start, 1.0)], dist=dist, backend="torch")
        assert torch.equal(ours, theirs)

    def rounded_as_interpreted(sums, dtype):
        """The interpreter cuts float32 to bfloat16 where the hardware rounds to nearest."""
        if dtype != torch.bfloat16:
            return sums.to(dtype)
        return (sums.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)

    @pytest.mark.parametrize("dist", DISTS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(("count", "scale"), [(0, 0.9), (1, 1.0), (2, 0.9), (2, 0.0), (3, 0.9)])
    def test_same_bits_as_torch_for_any_sum(dist, dtype, count, scale):
        generator = torch.Generator().manual_seed(count)
        tensors = [torch.randn(n, generator=generator).to(dtype) for n in (3, 2000, 16)]
        starts = list(accumulate([len(t) for t in tensors[:-1]], initial=13))
        terms = [(2**64 - 1 - j, 0.3 * j - 1) for j in range(count)]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        sums = [t.to(wide) for t in tensors]
        add_noise_(sums, starts, terms, scale=scale, dist=dist, backend="torch")
        out = [torch.full_like(t, float("nan")) for t in tensors]
        kept = [t.clone() for t in tensors]
        add_noise_(tensors, starts, terms, scale=scale, dist=dist, backend="triton", out=out)
        assert all(map(torch.equal, tensors, kept))
        add_noise_(tensors, starts, terms, scale=scale, dist=dist, backend="triton")
        for made, in_place, total in zip(out, tensors, sums, strict=True):
            assert torch.equal(made, rounded_as_interpreted(total, dtype))
            assert torch.equal(in_place, made)

    @pytest.mark.parametrize("dist", DISTS)
    def test_programs_with_several_tiles_and_tensors_cover_everything_once(dist, monkeypatch):
        monkeypatch.setattr(_triton, "PROGRAMS", 2)
        _triton._tables.cache_clear()
        tensors = [torch.zeros(n) for n in (13_001, 5, 4000)]
        starts = [7, 13_008, 13_013]
        rows = tuple((0, 0, start, len(t)) for start, t in zip(starts, tensors, strict=True))
        _, owners, tiles = _triton._tables(rows, dist, torch.device("cpu"))
        assert tiles > 1
        assert owners.bincount().tolist() == [
            max(1, -(-len(t) // (tiles * _triton.TILE[dist]))) for t in tensors
        ]
        add_noise_(tensors, starts, [(4, 1.0)], dist=dist, backend="triton")
        _triton._tables.cache_clear()
        assert torch.equal(torch.cat(tensors), noise(4, 7, 17_006, dist=dist))

    def test_strided_tensors_and_parameters():
        weight = torch.nn.Parameter(torch.zeros(40, 30).T)
        assert not weight.is_contiguous()
        add_noise_([weight], [5], [(4, 1.0)], backend="triton")
        assert torch.equal(weight.detach(), noise(4, 5, 1200).view(30, 40))

else:

    def test_the_kernel_agrees_with_torch_in_the_interpreter():
        finished = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE)],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=250,
            cwd=HERE.parents[2],
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert int(re.search(r"(\d+) passed", finished.stdout)[1]) > 70
        assert "skipped" not in finished.stdout

    def test_triton_is_refused_on_the_cpu():
        with pytest.raises(MissingBackend, match=r"backend='triton' works on CUDA, the tensors are on 'cpu'"):
            resolve_backend("triton", "cpu")

    def compiled(dist: str, dtype: torch.dtype, aligned: bool, count: int, scale: float = 1.0) -> str:
        """PTX of the kernel for compute capability 9.0: needs Triton, no GPU."""
        compiler = importlib.import_module("triton.compiler")
        target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
        module = importlib.import_module("papercore.mezo._triton")
        kinds = {torch.int32: "*i32", torch.int64: "*i64", torch.float32: "*fp32", torch.float64: "*fp64"}
        arguments, options = module.launch(
            ((0, 0, 0, 1 << 20),), dtype, aligned, [(1, 1.0)] * count, scale, dist, torch.device("cpu")
        )
        signature, constants = {}, {}
        for name, value in arguments.items():
            if name.isupper():
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = kinds[value.dtype]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
        source = compiler.ASTSource(fn=module._sum_kernel, signature=signature, constexprs=constants)
        return compiler.compile(source, target=target, options=options).asm["ptx"]

    @pytest.mark.parametrize("dist", DISTS)
    @pytest.mark.parametrize(
        ("dtype", "count", "scale"),
        [(torch.float32, 1, 1.0), (torch.bfloat16, 2, 0.9), (torch.float16, 3, 0.9), (torch.float64, 1, 0.0)],
    )
    def test_the_kernel_compiles_for_a_gpu(dist, dtype, count, scale):
        ptx = compiled(dist, dtype, True, count, scale)
        operations = Counter(re.findall(r"^\s+(?:@%p\d+ )?([a-z][\w.]+)", ptx, re.MULTILINE))
        # One rounding for each product and sum: that makes the bits the torch path's.
        assert not [
            name for name in operations if name.startswith("fma") or "approx" in name or ".ftz" in name
        ]
        wide = {torch.float64: "v2.b64"}.get(dtype, "v4.b32")
        assert operations[f"st.global.{wide}"] >= 1  # 16 bytes at a time
        if scale != 0.0:
            assert operations[f"ld.global.{wide}"] >= 1
        if dtype == torch.bfloat16:
            assert [name for name in operations if name.startswith("cvt.rn.bf16")]
        if dist == "gaussian":
            assert "sqrt.rn.f32" in operations
        else:
            # 4,096 signs are 32 counters: one Philox (two products in each of 10 rounds) a thread and term.
            products = sum(
                n for name, n in operations.items() if name.startswith(("mul.wide.u32", "mul.hi.u32"))
            )
            assert products <= 24 * min(count, 2)

    def test_unaligned_tensors_compile_too():
        for dist in DISTS:
            assert "st.global.b32" in compiled(dist, torch.float32, False, 1)

    def test_triton_without_a_gpu_is_not_taken(monkeypatch):
        module = importlib.import_module("papercore.mezo._triton")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert not module.works.__wrapped__()

    def test_a_toolchain_that_fails_is_reported_and_not_taken(monkeypatch):
        module = importlib.import_module("papercore.mezo._triton")

        def fail(*arguments):
            raise RuntimeError("no C compiler")

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch, "zeros", lambda *size, device: torch.empty(*size))
        monkeypatch.setattr(module, "run", fail)
        with pytest.warns(UserWarning, match="cannot run .no C compiler.: noise on CUDA is made by torch"):
            assert not module.works.__wrapped__()

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("backend", ["triton", "torch"])
    @pytest.mark.parametrize("dist", DISTS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
    def test_the_gpu_makes_the_cpus_bits(backend, dist, dtype):
        assert resolve_backend("auto", "cuda") == "triton"
        generator = torch.Generator().manual_seed(0)
        shapes = [(3,), (1000, 1000), (16,), (4096, 65), (30, 40)]
        tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        starts = list(accumulate([t.numel() for t in tensors[:-1]], initial=2**34 + 13))
        for count, scale in ((0, 0.9), (1, 1.0), (2, 0.9), (2, 0.0), (5, 0.9)):
            terms = [(2**64 - 1 - j, 0.3 * j - 1) for j in range(count)]
            here, there = [t.clone() for t in tensors], [t.cuda() for t in tensors]
            there[-1] = there[-1].T.contiguous().T  # strided
            add_noise_(here, starts, terms, scale=scale, dist=dist, backend="torch")
            add_noise_(there, starts, terms, scale=scale, dist=dist, backend=backend)
            assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))
