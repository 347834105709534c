"""The search behind `bench.py --tune`: block sizes of each kernel for the GPU that is here.

Every candidate is checked by the three-way rule on the case's own shape before it is timed, and
takes the default's place only where it is 3 % faster in a second race of the two. The choice goes
to tuned.json under the GPU's architecture; ahead-of-time numbers follow with
`python tests/aot.py --write`.
"""

import json
import statistics
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import bench

from qwen2audio_kernels import _launch

TABLE = Path(_launch.__file__).parent / "tuned.json"
GAIN = 0.97  # a candidate's time over the default's that is worth an entry

# Kernel -> values to try. Constraints that the kernels state in their files are kept here: int4
# among several rows takes one group of 128 inputs at a time; log_mel's tables are padded to 16.
WIDE = {"BLOCK": [512, 1024, 2048, 4096], "num_warps": [2, 4, 8]}
TILES = {"BLOCK_M": [64, 128], "BLOCK_N": [32, 64, 128], "num_warps": [4, 8], "num_stages": [2, 3]}
GEMV = {"BLOCK_N": [4, 8, 16], "BLOCK_K": [256, 512, 1024], "STAGES": [2, 4], "num_warps": [2, 4]}
SMALL = {"BLOCK_M": [64], "BLOCK_N": [64, 128], "BLOCK_K": [64, 128], "STAGES": [3, 4]}
SEARCH: dict[str, dict[str, list[int]]] = {
    "rope": {"BLOCK_HEADS": [4, 8, 16, 32], "num_warps": [1, 2, 4, 8]},
    "swiglu": WIDE,
    "gelu": WIDE,
    "cross_entropy": {"BLOCK": [2048, 4096, 8192], "num_warps": [4, 8, 16]},
    **{f"attention_{k}_{c}": TILES for k in ("fwd", "bwd_dq", "bwd_dkv") for c in (64, 128)},
    "decode_attention": {"SPLIT": [64, 128, 256], "BLOCK_N": [16, 32, 64], "num_warps": [2, 4]},
    "gemv_float": GEMV,
    "gemv_int8": GEMV,
    "gemv_int4": GEMV,
    "linear_float": SMALL,
    "linear_int8": SMALL,
    "linear_int4": {**SMALL, "BLOCK_K": [128]},
    "log_mel": {"BLOCK_F": [16, 32], "BLOCK_Q": [32, 64], "BLOCK_N": [16, 32], "num_warps": [4, 8]},
    "sample": {"CHUNK": [256, 512, 1024], "TILE": [8, 16, 32], "num_warps": [8, 16, 32]},
}
# What the interpreter runs with, to see that every step of the search works.
FEW = 2


def candidates(key: str, few: bool) -> Iterator[dict[str, int]]:
    if key not in SEARCH:
        raise SystemExit(f"error: {key} has no entry in SEARCH of kernels/benchmarks/tune.py")
    search = SEARCH[key]
    for number, values in enumerate(product(*search.values())):
        if few and number == FEW:
            return
        yield dict(zip(search, values, strict=True))


def tune(cases: list[Any], device: str, dtype: Any, samples: int, write: bool) -> dict[str, dict]:
    """Search for every kernel that the cases name; returns key -> what differs from the default.

    write  whether tuned.json is rewritten; without, the choice is only printed
    """
    import torch

    arch = _launch.arch(torch.device(device, 0) if device == "cuda" else torch.device(device))
    chosen: dict[str, dict] = {}
    for case in cases:
        for name, direction in case.tunes:
            key = f"{name}_float32" if dtype == torch.float32 else name
            key = key if key in _launch._table() else name
            print(f"tuning {key} on {case.shape}", flush=True)
            try:
                chosen[key] = search(key, name, case, direction, arch, device, dtype, samples)
            except AssertionError as error:
                print(f"    left as it is, the default fails its check: {error}")
                continue
            print(f"    {chosen[key] or 'the default is best'}")
    if write:
        for key, values in chosen.items():
            place(key, arch, values)
        save(TABLE)
        print(f"wrote {TABLE.name}; next: python tests/aot.py --write")
    return chosen


def search(
    key: str, name: str, case: Any, direction: str, arch: str, device: str, dtype: Any, samples: int
) -> dict[str, int]:
    """The best settings of one kernel, as what differs from its default; the table stays as is."""
    entry = _launch._table()[key]
    before = entry.get(arch)
    default = dict(entry["default"])
    try:
        best, best_ms = {}, timed(key, arch, {}, case, direction, device, dtype, samples)
        for candidate in candidates(name, few=device == "cpu"):
            difference = {k: v for k, v in candidate.items() if default.get(k) != v}
            try:
                ms = timed(key, arch, difference, case, direction, device, dtype, samples)
            except AssertionError as error:
                print(f"    {candidate}: wrong, {error}")
                continue
            except Exception as error:  # too much shared memory, a size that does not divide, ...
                print(f"    {candidate}: {str(error).splitlines()[0] if str(error) else error!r}")
                continue
            if ms < best_ms:
                best, best_ms = difference, ms
        if not best:
            return {}
        again = timed(key, arch, best, case, direction, device, dtype, samples)
        plain = timed(key, arch, {}, case, direction, device, dtype, samples)
        return best if again < GAIN * plain else {}
    finally:
        place(key, arch, before)


def timed(
    key: str,
    arch: str,
    difference: dict[str, int],
    case: Any,
    direction: str,
    device: str,
    dtype: Any,
    samples: int,
) -> float:
    """Median milliseconds with these settings, checked first."""
    place(key, arch, difference)
    bench.verify(case, device, dtype)
    gradients = case.gradients if direction == "both" else ()
    arm = bench.Arm(case.kernel, bench.copies_of(case, device, dtype), gradients)
    arm.prepare(device, case.graph)
    return statistics.median(arm.sample(device) for _ in range(samples))


def place(key: str, arch: str, difference: dict[str, int] | None) -> None:
    """Make `settings` return these for the architecture, from now on in this process."""
    entry = _launch._table()[key]
    entry.pop(arch, None)
    if difference:
        entry[arch] = difference
    _launch.settings.cache_clear()


def save(path: Path) -> None:
    """One kernel a line, as the table is kept."""
    lines = [f'  "{key}": {json.dumps(entry)}' for key, entry in _launch._table().items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
