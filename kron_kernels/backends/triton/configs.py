"""Configurations of the Triton kernels: which factor mixes, and the tiles of a launch.

The tiles follow a rule. A table measured on a GPU, ``tuned/<name>.json`` written by
``python -m benchmarks.gpu --only tuning``, overrides it. This module needs PyTorch only.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch

from kron_kernels.files import write_file
from kron_kernels.shapes import KronShape

TUNED = Path(__file__).parent / "tuned"

_MAX_MIX = 64  # a mix with a longer side does not fit a tile beside the accumulators
MAX_VECTORS = 32  # vectors that a thread holds at once
_MAX_RANK = 16  # the loop over terms is unrolled
SUMS_FEED_FORWARD = 192 * 1024  # bytes of accumulators of both products
_SUMS = 96 * 1024  # bytes of accumulators in a program: 96 of a thread's 255 registers at 8 warps


@dataclass(frozen=True)
class Geometry:
    """The roles of the factors: ``dot (rank, N, K)`` on tensor cores, ``mix (rank, O, U)``."""

    O: int
    U: int
    N: int
    K: int
    rank: int
    inner: bool  # the mix is the right factor: vectors are interleaved in memory
    mix_first: bool

    @property
    def by_dot(self) -> bool:
        """Whether the mix uses tensor cores: it fills more than half of a 16 x 16 tile's sides."""
        return min(self.O, self.U) > 8

    @property
    def vectors(self) -> int:
        """Rows of a token in the product's left operand, rounded up to a power of two."""
        return power_of_two(self.O if self.mix_first else self.U)

    @property
    def sums(self) -> int:
        """Accumulators of a program for each token and column of the product."""
        return self.vectors * (1 if self.mix_first else self.rank)

    def dense_gradient_pays(self, itemsize: int, exact: bool) -> bool:
        """Whether to derive the factors' gradients from the dense weight's, a plain product.

        It needs more operations than the kernel for the mix, but does not write and read its
        intermediates v and z. In the time of a byte of memory traffic a GPU does about 200 16-bit
        operations, 100 in tf32 or 10 in exact float32.
        """
        few, many = self.O * self.N, self.U * self.K
        between = 4 * self.rank * self.O * self.K
        passes = itemsize * ((2 + 2 * self.inner) * few + many + between)
        rate = 200 if itemsize == 2 else 10 if exact else 100
        return 2 * few * many / rate + itemsize * (few + many) < passes

    @property
    def transposed(self) -> Geometry:
        """The transposed product: inputs and outputs, mix first and mix last change places."""
        return Geometry(self.U, self.O, self.K, self.N, self.rank, self.inner, not self.mix_first)


@dataclass(frozen=True)
class Tile:
    """The part of a launch that one program computes, and Triton's options for it."""

    tokens: int
    depth: int  # entries of an input vector in a step
    columns: int  # entries of an output vector in a tile
    tiles: int
    warps: int
    stages: int


@dataclass(frozen=True)
class GPU:
    name: str
    multiprocessors: int
    shared: int  # bytes of shared memory that a program may use


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@lru_cache(maxsize=4096)
def geometry(s: KronShape) -> Geometry | None:
    """The cheapest geometry of a product, or None if the kernels cannot compute it.

    Either factor may mix, and either may come first. Ties go to the smaller mix, then to the mix
    first, whose accumulators do not grow with the rank.
    """
    if s.rank > _MAX_RANK:
        return None
    ways = []
    for order in ("b_first", "a_first"):
        for inner in (True, False):
            mix_first = inner == (order == "b_first")
            (o, u), (n, k) = ((s.m2, s.n2), (s.m1, s.n1)) if inner else ((s.m1, s.n1), (s.m2, s.n2))
            g = Geometry(o, u, n, k, s.rank, inner, mix_first)
            held = power_of_two(u) if mix_first else g.rank * power_of_two(u)
            if max(o, u) <= _MAX_MIX and (g.by_dot or held <= MAX_VECTORS):
                ways.append((s.multiply_adds(order), o * u, not mix_first, g))
    return min(ways, key=lambda way: way[:3])[-1] if ways else None


def pieces(size: int, largest: int) -> int:
    """Length of the pieces of ``size``, a trade-off of long pieces and little padding.

    The overhead of a piece counts as 16 entries: 384 is 3 x 128, 192 is 3 x 64, 48 is 1 x 64.
    """
    lengths = [p for p in (16, 32, 64, 128) if p <= max(16, largest)]
    return min(lengths, key=lambda p: (-(-size // p) * (p + 16), -p))


@lru_cache(maxsize=4096)
def rule(g: Geometry, tokens: int, itemsize: int, exact: bool, gpu: GPU, products: int = 1) -> Tile:
    """The tile of a forward launch, without measurements.

    - Every program reads the factor from the L2 cache: give it enough tokens that they are at least
      as many bytes, if they fit.
    - Smaller blocks leave room for several programs on a multiprocessor: one computes while another
      waits for memory.
    - If one program computes all columns, x is read once.
    - With few tokens, give every multiprocessor a program: split the columns first, because x is
      small then, and the tokens next.
    - ``exact`` float32 has no tensor cores and runs best with small tiles.
    """
    rows = 32 if exact else 128 if g.by_dot else 64
    columns = pieces(g.N, 32 if exact else 128)
    # Several products need more accumulators for the same tokens: those of 16 fit in thin pieces.
    budget = _SUMS // 4 if exact else _SUMS if products == 1 else _SUMS * 3 // 2
    if products * columns * max(16, g.sums) * 4 > budget:
        columns = 32

    def tiles_for(block: int) -> int:
        return max(1, budget // (products * block * g.sums * columns * 4))

    def programs(block: int, tiles: int) -> int:
        return -(-tokens // block) * -(-needed // tiles)

    factor, token = g.rank * g.N * g.K, g.U * g.K + g.O * g.N
    least = max(1, 16 // g.vectors)  # 16 rows fill a tensor core
    needed = -(-g.N // columns)
    block = max(least, power_of_two(-(-factor // token)))
    while block * g.sums * columns * needed * 8 <= _SUMS // 2:  # 4 warps have room for twice that
        block *= 2
    block = min(block, max(1, rows // g.vectors))
    while block > least and tiles_for(block) < needed and products > 1:
        block //= 2
    block = min(block, max(least, power_of_two(tokens)))
    tiles = min(needed, tiles_for(block))
    while tiles > 1 and programs(block, tiles) < gpu.multiprocessors:
        tiles = -(-tiles // 2)
    while block > least and programs(block, tiles) < gpu.multiprocessors:
        block //= 2
    kept = products * block * g.sums * columns * tiles * 4
    warps = 8 if kept > _SUMS // 2 else 4

    depth = 16 if kept > _SUMS else pieces(g.K, 32 if itemsize == 4 else 64)
    if g.mix_first and not g.by_dot:
        held = power_of_two(g.O) + power_of_two(g.U) * g.inner
        while depth > 16 and block * depth * held > 96 * 32 * warps:
            depth //= 2
    # Two stages: Hopper's products read the next one while the last is in use.
    staged = block * power_of_two(g.U) + products * tiles * columns * g.rank
    while depth > 16 and 2 * itemsize * depth * staged > gpu.shared:
        depth //= 2
    return Tile(block, depth, columns, tiles, warps, 2)


@lru_cache(maxsize=4096)
def mix_gradient_tile(g: Geometry, tokens: int, gpu: GPU) -> tuple[Tile, int, int]:
    """The tile, the number of outputs of a program, and the number of shares of the tokens.

    A thread keeps a sum for every pair of an output and an input in up to 128 registers: 32 pairs
    of 4 entries. There are enough shares for 4 programs of 4 warps on every multiprocessor, some of
    which compute while others wait for memory.
    """
    group = max(1, min(g.O, 32 // power_of_two(g.U)))
    held = group * power_of_two(g.U)
    each = 8 if held <= 16 else 4 if held <= 32 else 2
    depth = pieces(g.K, 64)
    block = max(1, each * 128 // depth)
    programs = -(-g.K // depth) * -(-g.O // group) * g.rank
    shares = max(1, min(-(-4 * gpu.multiprocessors // programs), -(-tokens // (4 * block))))
    return Tile(block, depth, 0, 1, 4, 1), group, shares


@lru_cache(maxsize=4096)
def factor_gradient_tile(
    g: Geometry, tokens: int, dtype: torch.dtype, exact: bool, gpu: GPU
) -> tuple[Tile, int]:
    """The tile for a mix on tensor cores, and the number of shares of the tokens.

    There are only enough shares for two programs on every multiprocessor, because each share writes
    sums in float32 of the size of the factor.
    """
    wide = 32 if exact else 64 if dtype == torch.float32 else 128
    columns, depth = pieces(g.N, wide), pieces(g.K, wide // 2)
    block = max(1, (32 if exact else 64) // g.vectors)
    warps = 8 if columns * depth > 2**12 else 4
    programs = -(-g.N // columns) * -(-g.K // depth) * g.rank
    shares = max(1, min(2 * gpu.multiprocessors // programs, -(-tokens // (4 * block))))
    return Tile(block, depth, columns, 1, warps, 2), shares


@lru_cache(maxsize=4096)
def feed_forward_tile(
    vectors: tuple[int, int],
    ranks: tuple[int, int],
    sizes: tuple[int, int, int],
    tokens: int,
    itemsize: int,
    exact: bool,
    backward: bool,
) -> tuple[Tile, int]:
    """The tile, and the number of columns of y (in the backward, of dy) in a step.

    ``vectors`` counts a token's vectors in the first and the second product, as powers of two;
    ``sizes`` is N, K, M. The forward keeps the accumulators of both products. The backward keeps,
    for a tile of the hidden grid, the inputs from both sides and their gradients.
    """
    n, k, m = sizes
    most = 32 if exact else 64
    columns, depth = pieces(n, most), pieces(k, most if itemsize == 2 else 32)
    out = pieces(m, 32 if exact else most if backward else 128)
    block = max(1, 64 // max(vectors))

    def sums(block: int) -> int:
        first, second = vectors[0] * ranks[0], vectors[1]
        if backward:
            return 2 * block * (first + second * ranks[1]) * columns * 4
        padded = -(-n // columns) * columns, -(-m // out) * out
        return block * (first * padded[0] + second * padded[1]) * 4

    while block > 1 and block * max(vectors) > 16 and sums(block) > _SUMS:
        block //= 2
    block = max(1, min(block, max(16 // max(vectors), power_of_two(tokens))))
    if sums(block) > _SUMS * 3 // 4:  # no registers left for a deeper step
        depth = min(depth, 32)
    return Tile(block, depth, columns, 1, 8 if sums(block) > _SUMS // 2 else 4, 2), out


def tile(
    g: Geometry, tokens: int, dtype: torch.dtype, exact: bool, gpu: GPU, products: int = 1
) -> Tile:
    """The measured tile if there is one, else the rule's."""
    found = _table(gpu.name).get(key(g, tokens, dtype, products, exact))
    # All token counts up to a power of two share a tile, and with it the compiled kernel.
    return found or rule(g, power_of_two(max(tokens, 1)), dtype.itemsize, exact, gpu, products)


def key(
    g: Geometry, tokens: int, dtype: torch.dtype, products: int = 1, exact: bool = False
) -> str:
    """The name of a tile in a table; tokens are rounded up to a power of two."""
    name = f"{'exact ' * exact}{str(dtype)[6:]}"
    sizes = f"mix {g.O}x{g.U} dot {g.N}x{g.K} rank {g.rank}"
    places = f"{'inner' if g.inner else 'outer'} {'mix' if g.mix_first else 'dot'} first"
    return f"{sizes} {places} {name} x{products} {power_of_two(max(tokens, 1))} tokens"


@lru_cache(maxsize=64)
def _table(gpu: str) -> dict[str, Tile]:
    path = TUNED / f"{gpu.replace(' ', '-')}.json"
    if path.exists():
        return {k: Tile(**v) for k, v in json.loads(path.read_text()).items()}
    return {}


def save(gpu: str, tiles: dict[str, Tile]) -> Path:
    """Write a GPU's table, atomically."""
    TUNED.mkdir(parents=True, exist_ok=True)
    path = TUNED / f"{gpu.replace(' ', '-')}.json"
    write_file(path, json.dumps({k: asdict(v) for k, v in tiles.items()}, indent=1) + "\n")
    _table.cache_clear()
    return path


def device_of(x: torch.Tensor) -> GPU:
    """The GPU that holds x."""
    return _properties(x.device.index)


@lru_cache(maxsize=64)
def _properties(index: int) -> GPU:
    p = torch.cuda.get_device_properties(index)
    if not _table(p.name):
        warnings.warn(
            f"kron_kernels has no tiles measured on {p.name!r} and uses its rule instead; "
            "python -m benchmarks.gpu --only tuning measures them.",
            stacklevel=2,
        )
    shared = getattr(p, "shared_memory_per_block_optin", None) or 64 * 1024
    return GPU(p.name, p.multi_processor_count, shared)
