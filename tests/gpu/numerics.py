"""What a Hopper GPU computes where no standard says it: sums of products on the tensor cores, ex2
and rcp. Measures and keeps the raw pairs; looks in them for a model that gives the same bits.

    python tests/gpu/numerics.py OUT.npz          # on a GPU, with nvcc; under a minute
    python tests/gpu/numerics.py OUT.npz --fit    # anywhere

Inputs are made so that one run answers: how many bits of a product are kept and how the rest is cut
off ("pairs", "triples"), what the products are aligned to and whether the accumulator is among it
("alone", "wide"), which products are added together ("pairs": by position), in what order
instructions follow each other ("chain"), and that neither the width of the instruction nor where A
lies matters ("same"). Everything is dumped, so that other models can be tried later.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megamoe.machine.sums import Sums, add  # noqa: E402

ROWS, COLUMNS, BYTES = 64, 8, 32  # of a block; bytes of K of one instruction
WIDTHS = (8, 64, 128, 256)
KINDS = {
    "e4m3": ("k32", "f32.e4m3.e4m3", ", 1, 1"),
    "bf16": ("k16", "f32.bf16.bf16", ", 1, 1, 0, 0"),
}
CHAIN = 4  # instructions in a group

KERNEL = r"""
// A in shared memory (or registers), K-major, 128-byte swizzle; one CTA of 128 threads per block.
extern "C" __global__ void NAME(const uint8_t *a, const uint8_t *b, const float *c, float *d,
                                int steps, int fresh) {
  __shared__ __align__(1024) uint8_t sa[64 * 128], sb[N * 128];
  int t = threadIdx.x, lane = t % 32, warp = t / 32, chunks = 2 * steps;
  a += blockIdx.x * 64 * 32 * steps; b += blockIdx.x * 8 * 32 * steps;
  c += blockIdx.x * 64 * 8; d += blockIdx.x * 64 * N;
  for (int i = t; i < 64 * chunks; i += 128) {
    int row = i / chunks, chunk = i % chunks;
    *(uint4 *)(sa + row * 128 + (chunk ^ row % 8) * 16) = ((const uint4 *)a)[row * chunks + chunk];
  }
  for (int i = t; i < N * chunks; i += 128) {
    int row = i / chunks, chunk = i % chunks;
    const uint4 *from = (const uint4 *)b + row % 8 * chunks + chunk;
    *(uint4 *)(sb + row * 128 + (chunk ^ row % 8) * 16) = *from;
  }
  asm volatile("fence.proxy.async;" ::: "memory");
  __syncthreads();
  float s[N / 2];
#define ROW (16 * warp + lane / 4 + 8 * (i >> 1 & 1))
#define COL (8 * (i >> 2) + 2 * (lane % 4) + (i & 1))
  for (int i = 0; i < N / 2; i++) s[i] = c[ROW * 8 + COL % 8];
  uint64_t swizzled = 1ull << 62 | 64ull << 32 | 1 << 16;
  uint64_t da = swizzled | ((unsigned)__cvta_generic_to_shared(sa) & 0x3ffff) >> 4;
  uint64_t db = swizzled | ((unsigned)__cvta_generic_to_shared(sb) & 0x3ffff) >> 4;
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  for (int k = 0; k < steps; k++) {
    int keep = !(fresh && k == 0);
#if REGISTERS
    int row = 16 * warp + lane / 4;
    unsigned r[4];
    for (int i = 0; i < 4; i++) {
      int mine = row + 8 * (i & 1), chunk = 2 * k + (i >> 1);
      r[i] = *(unsigned *)(sa + mine * 128 + (chunk ^ mine % 8) * 16 + lane % 4 * 4);
    }
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %LAST, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64nNKIND {REGS}, OPERANDS, p MORE; }\n"
                 : OUTPUTS : INPUTS);
  }
  asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < N / 2; i++) d[ROW * N + COL] = s[i];
}
"""
HOST = r"""
extern "C" __global__ void unary(int which, const float *x, float *y, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    if (which) asm volatile("rcp.approx.ftz.f32 %0, %1;" : "=f"(y[i]) : "f"(x[i]));
    else asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y[i]) : "f"(x[i]));
}
static void *put(const void *p, size_t n) {
  void *q; cudaMalloc(&q, n); cudaMemcpy(q, p, n, cudaMemcpyHostToDevice); return q;
}
static int got(void *p, void *q, size_t n) {
  int status = cudaMemcpy(p, q, n, cudaMemcpyDeviceToHost); cudaFree(q); return status;
}
extern "C" int run_unary(int which, const float *x, float *y, int n) {
  void *dx = put(x, 4ull * n), *dy = put(y, 4ull * n);
  unary<<<1024, 256>>>(which, (float *)dx, (float *)dy, n);
  cudaFree(dx); /* waits */
  return got(y, dy, 4ull * n);
}
typedef void (*kernel)(const uint8_t *, const uint8_t *, const float *, float *, int, int);
extern "C" int run_blocks(int which, int n, const void *a, const void *b, const void *c, void *d,
                          int steps, int fresh) {
  static const kernel kernels[] = {KERNELS};
  static const int widths[] = {WIDTHS};
  size_t bytes = 256ull * widths[which] * n, deep = 256ull * steps * n;
  void *da = put(a, 8 * deep), *db = put(b, deep), *dc = put(c, 2048ull * n);
  void *dd = put(d, bytes);
  kernels[which]<<<n, 128>>>((uint8_t *)da, (uint8_t *)db, (float *)dc, (float *)dd, steps, fresh);
  cudaFree(da); cudaFree(db); cudaFree(dc);
  return got(d, dd, bytes);
}
extern "C" const char *describe(void) {
  static cudaDeviceProp properties; cudaGetDeviceProperties(&properties, 0); return properties.name;
}
"""


def variants() -> list[tuple[str, int, bool]]:
    """(kind, N, A in registers) of every kernel, in the order of `run_blocks`."""
    return [(kind, width, False) for kind in KINDS for width in WIDTHS] + [
        (kind, 8, True) for kind in KINDS
    ]


def source() -> str:
    """The CUDA source of all variants."""
    text, names = "#include <stdint.h>\n#include <cuda_runtime.h>\n", []
    for kind, width, registers in variants():
        shape, types, more = KINDS[kind]
        count = width // 2
        names.append(f"{kind}_{width}_{int(registers)}")
        inputs = [f'"r"(r[{i}])' for i in range(4)] if registers else ['"l"(da + 2 * k)']
        inputs += ['"l"(db + 2 * k)', '"r"(keep)']
        number = iter(range(count, count + len(inputs)))
        left = f"%{next(number)}"
        if registers:
            left = f"{{{', '.join([left, *(f'%{next(number)}' for _ in range(3))])}}}"
        operands = f"{left}, %{next(number)}"
        if registers and kind == "bf16":
            more = ", 1, 1, 0"
        replaced = {
            "NAME": names[-1], "KIND": f"{shape}.{types}", "REGISTERS": str(int(registers)),
            "REGS": ", ".join(f"%{i}" for i in range(count)), "OPERANDS": operands, "MORE": more,
            "OUTPUTS": ", ".join(f'"+f"(s[{i}])' for i in range(count)),
            "INPUTS": ", ".join(inputs), "LAST": str(next(number)),
        }  # fmt: skip
        body = KERNEL.replace("m64nN", f"m64n{width}")
        for name, value in replaced.items():
            body = body.replace(name, value)
        text += f"#define N {width}\n{body}\n#undef N\n#undef ROW\n#undef COL\n"
    widths = ", ".join(str(width) for _, width, _ in variants())
    return text + HOST.replace("KERNELS", ", ".join(names)).replace("WIDTHS", widths)


def library(directory: str) -> ctypes.CDLL:
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    path, target = Path(directory) / "numerics.cu", Path(directory) / "numerics.so"
    path.write_text(source())
    options = "-gencode=arch=compute_90a,code=sm_90a -shared -Xcompiler -fPIC -w"
    command = f"{nvcc} {options} -o {target} {path}"
    subprocess.run(command.split(), check=True)
    return ctypes.CDLL(str(target))


# Operands


def decode(kind: str, stored: np.ndarray) -> np.ndarray:
    """Values of operand bytes along the last axis."""
    if kind == "bf16":
        return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    values[code & 127 == 127] = np.nan
    return np.where(code > 127, -values, values).astype(np.float32)[stored]


def encode(kind: str, values: np.ndarray) -> np.ndarray:
    """Operand bytes of the nearest values (ties anywhere) along the last axis."""
    values = np.asarray(values, np.float32)
    if kind == "bf16":
        return ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16).view(np.uint8)
    table = decode("e4m3", np.arange(127, dtype=np.uint8))
    right = np.searchsorted(table, np.abs(values)).clip(1, 126)
    low, high = table[right - 1], table[right]
    code = np.where(np.abs(values) - low < high - np.abs(values), right - 1, right).astype(np.uint8)
    return code | (np.signbit(values).astype(np.uint8) << 7)


def cases(kind: str) -> dict[str, tuple]:
    """By name: bytes of A [n, 64, ...] and B [n, 8, ...], C [n, 64, 8], instructions, fresh."""
    random = np.random.default_rng(7)
    depth = BYTES // (1 if kind == "e4m3" else 2)
    span = 8 if kind == "e4m3" else 30  # binades of wide operands, either side of 1

    def scattered(*shape):
        sign = random.choice([-1.0, 1.0], shape)
        return sign * random.uniform(1, 2, shape) * 2.0 ** random.integers(-span, span, shape)

    def made(a, b, c=None, steps=1, fresh=0):
        c = np.zeros((len(a), ROWS, COLUMNS)) if c is None else c
        with np.errstate(over="ignore"):
            return encode(kind, a), encode(kind, b), c.astype(np.float32), steps, fresh

    normal = random.standard_normal
    n, c_shape = 40, (40, ROWS, COLUMNS)
    found = {
        "normal": made(normal((n, ROWS, depth)), normal((n, COLUMNS, depth))),
        "normal_c": made(
            normal((n, ROWS, depth)), normal((n, COLUMNS, depth)), normal(c_shape) * depth**0.5
        ),
        "wide": made(scattered(n, ROWS, depth), scattered(n, COLUMNS, depth)),
        "wide_c": made(
            scattered(n, ROWS, depth),
            scattered(n, COLUMNS, depth),
            normal(c_shape) * 2.0 ** random.integers(-2 * span - 6, 2 * span + 6, c_shape),
        ),
    }
    for name, draw in (("chain", normal), ("chain_wide", lambda shape: scattered(*shape))):
        shape = (16, ROWS, CHAIN * depth), (16, COLUMNS, CHAIN * depth)
        found[name] = made(*map(draw, shape), normal((16, ROWS, COLUMNS)), CHAIN)
        found[f"{name}_fresh"] = made(*map(draw, shape), normal((16, ROWS, COLUMNS)), CHAIN, 1)
    # One large product at i, a small one at j; columns: signs, and a longer mantissa.
    factors = np.array([1, -1, 1.125, 1.875, -1.875, 1.5, 0.5, 2])
    columns = np.repeat(factors[:, None], depth, 1)
    pairs = list(itertools.permutations(range(depth), 2))
    pairs += [(0, 0)] * (-len(pairs) % ROWS)
    a = []
    for shift in range(9, 17) if kind == "e4m3" else range(20, 30):
        rows = np.zeros((len(pairs), depth))
        for row, (i, j) in zip(rows, pairs, strict=True):
            row[j] = -(2.0 ** (8 - shift)) if (i + j) % 2 else 2.0 ** (8 - shift)
            row[i] = 256.0
        a.append(rows)
    a = np.concatenate(a).reshape(-1, ROWS, depth)
    found["pairs"] = made(a, np.repeat(columns[None], len(a), 0))
    # Two large products that cancel, and small ones: what is left of them.
    a = np.zeros((n, ROWS, depth))
    few = random.integers(2, depth // 2, (n, ROWS))
    low = 17 if kind == "e4m3" else 32
    for block, row in itertools.product(range(n), range(ROWS)):
        places = random.permutation(depth)
        some = places[2 : 2 + few[block, row]]
        a[block, row, some] = random.choice([-1, 1], len(some)) * random.integers(8, 16, len(some))
        a[block, row, some] *= 2.0 ** (8 - 3 - random.integers(5, low, len(some)))
        a[block, row, places[:2]] = 256.0, -256.0
    found["triples"] = made(a, np.repeat(columns[None], n, 0))
    # One product and the accumulator.
    a, b = np.zeros((n, ROWS, depth)), scattered(n, COLUMNS, depth)
    for block, row in itertools.product(range(n), range(ROWS)):
        a[block, row, random.integers(depth)] = scattered(1)[0]
    c = normal(c_shape) * 2.0 ** random.integers(-2 * span - 14, 2 * span + 14, c_shape)
    found["alone"] = made(a, b, c)
    # Not finite, zeros of both signs, results at both ends of float32.
    a, b = normal((8, ROWS, depth)), normal((8, COLUMNS, depth))
    c = normal((8, ROWS, COLUMNS)) * random.choice(
        [0.0, -0.0, 1e-38, 1e-41, 3e38, np.inf, -np.inf, np.nan, 1.0], (8, ROWS, COLUMNS)
    )
    a[::2] *= random.choice([0.0, -0.0, 1.0], (4, ROWS, 1))
    stored = made(a, b, c)
    if kind == "e4m3":
        stored[0][5::3, ::7, 3] = 0x7F
    else:
        stored[0].view(np.uint16)[5::3, ::7, 3] = random.choice([0x7F80, 0xFF80, 0x7FC0], (1, 10))
        small = [scattered(8, rows, depth) * 2.0**-52 for rows in (ROWS, COLUMNS)]
        found["small"] = made(*small, normal((8, ROWS, COLUMNS)) * 1e-38)
    found["special"] = stored
    return found


def measure(out: Path) -> None:
    start = time.time()
    kept: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as directory:
        lib = library(directory)
        lib.describe.restype = ctypes.c_char_p
        kept["gpu"] = np.array(lib.describe().decode())
        print(f"{kept['gpu']}: nvcc {time.time() - start:.1f} s")

        def blocks(which, a, b, c, steps, fresh):
            d = np.zeros((len(a), ROWS, variants()[which][1]), np.float32)
            packed = [np.ascontiguousarray(x) for x in (a, b, c)]
            pointers = [ctypes.c_void_p(x.ctypes.data) for x in (*packed, d)]
            status = lib.run_blocks(which, len(a), *pointers, steps, fresh)
            assert status == 0, f"CUDA error {status}"
            return d

        for kind in KINDS:
            first = variants().index((kind, WIDTHS[0], False))
            for name, case in cases(kind).items():
                d = blocks(first, *case)
                for part, value in zip("abcd", (*case[:3], d), strict=True):
                    kept[f"{kind}/{name}/{part}"] = value
                kept[f"{kind}/{name}/steps"] = np.array(case[3:])
                for which, (other, width, registers) in enumerate(variants()):
                    if other == kind and which != first:
                        wide = blocks(which, *case)
                        tiled = np.tile(d, (1, 1, width // COLUMNS))
                        same = (wide.view(np.uint32) == tiled.view(np.uint32)) | (
                            np.isnan(wide) & np.isnan(tiled)
                        )
                        label = f"{kind}/{name}/same/{width}{'r' if registers else ''}"
                        kept[label] = np.array([same.sum(), same.size])
                        if not same.all():
                            print(f"{label}: {same.size - same.sum()} of {same.size} differ")
        for which, name in enumerate(("ex2", "rcp")):
            x = (np.arange(1 << 23, dtype=np.uint32) + 0x3F800000).view(np.float32)
            exact = np.exp2(x.astype(np.float64)) if name == "ex2" else 1 / x.astype(np.float64)
            near = np.random.default_rng(3).integers(0, 1 << 32, 1 << 17, dtype=np.uint32)
            for part, inputs in (("all", x), ("some", near.view(np.float32))):
                y = np.zeros_like(inputs)
                pointers = [ctypes.c_void_p(v.ctypes.data) for v in (inputs, y)]
                assert lib.run_unary(which, *pointers, len(y)) == 0
                if part == "some":
                    kept[f"{name}/some"] = np.stack([inputs, y])
                else:  # units in the last place from the nearest float32, for every x in 1..2
                    off = y.view(np.int32) - exact.astype(np.float32).view(np.int32)
                    print(f"{name}: {np.unique(off, return_counts=True)}")
                    kept[f"{name}/off"] = off.clip(-128, 127).astype(np.int8)
    np.savez_compressed(out, **kept)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {time.time() - start:.1f} s")


# Models


def candidates(kind: str):
    """Every model of the family."""
    depths = (4, 8, 16, 32) if kind == "e4m3" else (4, 8, 16)
    bits = range(11, 17) if kind == "e4m3" else range(22, 28)
    flags = itertools.product((True, False), repeat=4)
    for group, kept, (with_c, normalised, floor, nearest) in itertools.product(depths, bits, flags):
        yield Sums(kept, group, with_c, normalised, floor, nearest)


def agreement(kept, kind: str, name: str, sums: Sums, most: int) -> tuple[int, int]:
    """(results that are equal bit for bit, results) of a model in the first blocks of a case."""
    a, b, c, d = (kept[f"{kind}/{name}/{part}"][:most] for part in "abcd")
    steps, fresh = kept[f"{kind}/{name}/steps"]
    equal = 0
    for left, right, start, end in zip(decode(kind, a), decode(kind, b), c, d, strict=True):
        total, depth = np.zeros_like(start) if fresh else start, left.shape[1] // steps
        for step in range(steps):
            part = slice(step * depth, (step + 1) * depth)
            total = add(sums, kind, left[:, part], right[:, part], total)
        equal += np.count_nonzero((total == end) | (np.isnan(total) & np.isnan(end)))
    return equal, d.size


def fit(path: Path) -> None:
    """Print the models that agree best, then the best one case by case."""
    kept = np.load(path)
    print(f"fitted to {kept['gpu']}")
    for kind in KINDS:
        names = [key.split("/")[1] for key in kept if key.startswith(kind) and key.endswith("/d")]
        scores = []
        for sums in candidates(kind):
            few = [agreement(kept, kind, name, sums, 1) for name in names]
            scores.append((sum(e for e, _ in few) / sum(n for _, n in few), repr(sums), sums))
        scores.sort(reverse=True, key=lambda score: score[0])
        for share, text, _ in scores[:6]:
            print(f"{kind}: {100 * share:8.4f} % {text}")
        for name in names:
            equal, total = agreement(kept, kind, name, scores[0][2], 40)
            print(f"{kind} {name}: {total - equal} of {total} differ")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--fit", action="store_true", help="look for models in the file")
    arguments = parser.parse_args()
    fit(arguments.out) if arguments.fit else measure(arguments.out)
