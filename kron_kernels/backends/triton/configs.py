"""How a product is laid on a GPU: which factor mixes, and the tiles of a launch; needs torch only.

The choice is a rule with reasons. A table measured on a device, ``tuned/<device>.json`` written by
``python -m benchmarks.gpu --only tuning``, overrides it.
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

_MAX_MIX = 64  # a mix with a longer side does not fit a tile beside the sums
MAX_VECTORS = 32  # vectors that a thread holds at once
_MAX_RANK = 16  # terms are unrolled
SUMS_FEED_FORWARD = 192 * 1024  # bytes of sums of both products
_SUMS = 96 * 1024  # bytes of sums in a program: 96 of the 255 registers a thread at 8 warps


@dataclass(frozen=True)
class Geometry:
    """A product on the GPU: ``dot (rank, N, K)`` on tensor cores and ``mix (rank, O, U)``."""

    O: int
    U: int
    N: int
    K: int
    rank: int
    inner: bool  # the mix is the right factor: vectors lie interleaved
    mix_first: bool

    @property
    def by_dot(self) -> bool:
        """Whether the mix has room for tensor cores: 16 x 16, more than half of it filled."""
        return min(self.O, self.U) > 8

    @property
    def vectors(self) -> int:
        """Rows of a token in the product's left operand, rounded up to a power of two."""
        return power_of_two(self.O if self.mix_first else self.U)

    @property
    def sums(self) -> int:
        """Sums that a program keeps for a token and a column of the product."""
        return self.vectors * (1 if self.mix_first else self.rank)

    def dense_gradient_pays(self, itemsize: int, exact: bool) -> bool:
        """Whether the factors' gradients are best read off the dense weight's, a plain product.

        It costs more operations and fewer passes over memory than v and z do, which are made,
        written and read. A GPU does some 200 operations of 16 bits in the time of a byte, some 100
        in tf32, and 10 in exact float32.
        """
        few, many = self.O * self.N, self.U * self.K
        between = 4 * self.rank * self.O * self.K
        passes = itemsize * ((2 + 2 * self.inner) * few + many + between)
        rate = 200 if itemsize == 2 else 10 if exact else 100
        return 2 * few * many / rate + itemsize * (few + many) < passes

    @property
    def transposed(self) -> Geometry:
        """The same bilinear form read from its output: mix and product change places."""
        return Geometry(self.U, self.O, self.K, self.N, self.rank, self.inner, not self.mix_first)


@dataclass(frozen=True)
class Tile:
    """A program's share and how it runs."""

    tokens: int
    depth: int  # entries of an input vector at a time
    columns: int  # entries of an output vector in a tile
    tiles: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Device:
    name: str
    multiprocessors: int
    shared: int  # bytes that a program may have


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@lru_cache(maxsize=4096)
def geometry(s: KronShape) -> Geometry | None:
    """The cheapest way to multiply by such a product, or None if there is none.

    Either factor may mix and either come first; of equals the smaller mix, then the mix first,
    whose sums do not grow with the rank.
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
    """Length of the pieces in which to go through ``size``: long ones, and little padding.

    A piece costs as much as 16 entries: 384 goes as 3 x 128, 192 as 3 x 64, 48 as 1 x 64.
    """
    lengths = [p for p in (16, 32, 64, 128) if p <= max(16, largest)]
    return min(lengths, key=lambda p: (-(-size // p) * (p + 16), -p))


@lru_cache(maxsize=4096)
def rule(
    g: Geometry, tokens: int, itemsize: int, exact: bool, device: Device, products: int = 1
) -> Tile:
    """Tiles by reasoning.

    A program reads the factor from the L2 cache: for so many tokens that this is no more than they
    are themselves, if they fit. Smaller blocks leave room for several programs on a multiprocessor,
    one of which computes while another waits for memory. All columns in one program read x once.
    With few tokens every multiprocessor shall have a program: columns are divided first, for x is
    small then, next tokens. ``exact`` float32 has no tensor cores and wants small tiles.
    """
    rows = 32 if exact else 128 if g.by_dot else 64
    columns = pieces(g.N, 32 if exact else 128)
    # Several products need more sums for the same tokens; those of 16 fit, by the thinnest pieces.
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
    while block * g.sums * columns * needed * 8 <= _SUMS // 2:  # room in 4 warps for twice as many
        block *= 2
    block = min(block, max(1, rows // g.vectors))
    while block > least and tiles_for(block) < needed and products > 1:
        block //= 2
    block = min(block, max(least, power_of_two(tokens)))
    tiles = min(needed, tiles_for(block))
    while tiles > 1 and programs(block, tiles) < device.multiprocessors:
        tiles = -(-tiles // 2)
    while block > least and programs(block, tiles) < device.multiprocessors:
        block //= 2
    kept = products * block * g.sums * columns * tiles * 4
    warps = 8 if kept > _SUMS // 2 else 4

    depth = 16 if kept > _SUMS else pieces(g.K, 32 if itemsize == 4 else 64)
    if g.mix_first and not g.by_dot:
        held = power_of_two(g.O) + power_of_two(g.U) * g.inner
        while depth > 16 and block * depth * held > 96 * 32 * warps:
            depth //= 2
    # Twice what a stage holds: Hopper's products read the next while the last is in use.
    staged = block * power_of_two(g.U) + products * tiles * columns * g.rank
    while depth > 16 and 2 * itemsize * depth * staged > device.shared:
        depth //= 2
    return Tile(block, depth, columns, tiles, warps, 2)


@lru_cache(maxsize=4096)
def mix_gradient_tile(g: Geometry, tokens: int, device: Device) -> tuple[Tile, int, int]:
    """The tile, how many outputs a program mixes, and into how many shares tokens are divided.

    A thread sums what it sees of every pair of an output and an input in registers, 128 at most:
    so 32 pairs of 4 entries each. Shares are as many as give every multiprocessor 4 programs of 4
    warps, so that some compute while others wait for memory.
    """
    group = max(1, min(g.O, 32 // power_of_two(g.U)))
    held = group * power_of_two(g.U)
    each = 8 if held <= 16 else 4 if held <= 32 else 2
    depth = pieces(g.K, 64)
    block = max(1, each * 128 // depth)
    programs = -(-g.K // depth) * -(-g.O // group) * g.rank
    shares = max(1, min(-(-4 * device.multiprocessors // programs), -(-tokens // (4 * block))))
    return Tile(block, depth, 0, 1, 4, 1), group, shares


@lru_cache(maxsize=4096)
def factor_gradient_tile(
    g: Geometry, tokens: int, dtype: torch.dtype, exact: bool, device: Device
) -> tuple[Tile, int]:
    """The tile for a mix on tensor cores, and into how many shares the tokens are divided.

    Shares are as few as give every multiprocessor two programs, for each writes its sums: float32
    of the size of the factor.
    """
    wide = 32 if exact else 64 if dtype == torch.float32 else 128
    columns, depth = pieces(g.N, wide), pieces(g.K, wide // 2)
    block = max(1, (32 if exact else 64) // g.vectors)
    warps = 8 if columns * depth > 2**12 else 4
    programs = -(-g.N // columns) * -(-g.K // depth) * g.rank
    shares = max(1, min(2 * device.multiprocessors // programs, -(-tokens // (4 * block))))
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
    """The tile, and the columns of y (in the backward: of dy) at a time.

    ``vectors`` of a token in the first and the second product, powers of two; ``sizes`` N, K, M.
    Forward, a program keeps the sums of both products; backward, of a tile of the hidden grid, what
    comes from either side and what goes.
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
    if sums(block) > _SUMS * 3 // 4:  # no registers left for more on the way to shared memory
        depth = min(depth, 32)
    return Tile(block, depth, columns, 1, 8 if sums(block) > _SUMS // 2 else 4, 2), out


def tile(
    g: Geometry, tokens: int, dtype: torch.dtype, exact: bool, device: Device, products: int = 1
) -> Tile:
    """The measured tile where there is one, else the rule's."""
    found = _table(device.name).get(key(g, tokens, dtype, products, exact))
    # A bucket of tokens shares its programs' tiles, and the compiled kernels with them.
    return found or rule(g, power_of_two(max(tokens, 1)), dtype.itemsize, exact, device, products)


def key(
    g: Geometry, tokens: int, dtype: torch.dtype, products: int = 1, exact: bool = False
) -> str:
    """Under what a table keeps a tile: tokens by powers of two."""
    name = f"{'exact ' * exact}{str(dtype)[6:]}"
    sizes = f"mix {g.O}x{g.U} dot {g.N}x{g.K} rank {g.rank}"
    places = f"{'inner' if g.inner else 'outer'} {'mix' if g.mix_first else 'dot'} first"
    return f"{sizes} {places} {name} x{products} {power_of_two(max(tokens, 1))} tokens"


@lru_cache(maxsize=64)
def _table(device: str) -> dict[str, Tile]:
    path = TUNED / f"{device.replace(' ', '-')}.json"
    if path.exists():
        return {k: Tile(**v) for k, v in json.loads(path.read_text()).items()}
    if device != SIMULATED.name:
        warnings.warn(
            f"kron_kernels has no tiles measured on {device!r} and takes those of its rule; "
            "python -m benchmarks.gpu --only tuning measures them.",
            stacklevel=2,
        )
    return {}


def save(device: str, tiles: dict[str, Tile]) -> Path:
    """Write a device's table; a killed process leaves the old one or the new one."""
    TUNED.mkdir(parents=True, exist_ok=True)
    path = TUNED / f"{device.replace(' ', '-')}.json"
    write_file(path, json.dumps({k: asdict(v) for k, v in tiles.items()}, indent=1) + "\n")
    _table.cache_clear()
    return path


# Stands for the GPU that tests simulate on CPU tensors: few multiprocessors, so that small cases
# take the tiles of large ones.
SIMULATED = Device("simulated", 2, 99 * 1024)
simulating = False  # tests set it


@lru_cache(maxsize=64)
def _properties(index: int) -> Device:
    p = torch.cuda.get_device_properties(index)
    shared = getattr(p, "shared_memory_per_block_optin", None) or 64 * 1024
    return Device(p.name, p.multi_processor_count, shared)


def device_of(x: torch.Tensor) -> Device:
    """The GPU that holds x."""
    return _properties(x.device.index) if x.is_cuda else SIMULATED
