"""Speed of every kernel at the model's real shapes, after its tests have passed.

    python kernels/benchmarks/bench.py                     on this GPU: all ops, results and table
    python kernels/benchmarks/bench.py --ops rope,gelu     these ops; other results stay
    python kernels/benchmarks/bench.py --tune              first remake tuned.json for this GPU
    python kernels/benchmarks/bench.py --device cpu --quick     the whole way through Triton's
                                                           interpreter at tiny shapes; keeps nothing
    python kernels/benchmarks/bench.py --table             the README's table from results/*.csv

No op whose tests fail gets a speed. Beside its tests, each case is checked at the shape that is
timed, by the rule of tests/tolerance.py. Then the arms (kernel, torch, eager, Liger, flash-attn)
alternate. A sample is one replay of a CUDA graph that holds a call on each of several copies of the
inputs, together four times larger than the GPU's cache, so that it is the kernels that are timed
and not the launches, and memory and not the cache. (There are 256 copies at most: a few rows fit
any cache.) Where an op cannot be recorded, all its arms are called one by one. "both" is forward
and backward together. Clocks are reported, never set.

A ratio is the other arm's median over the kernel's: above 1 the kernel is faster.
"""

import argparse
import csv
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "kernels" / "README.md"
RESULTS = ROOT / "kernels" / "benchmarks" / "results"
BEGIN, END = "<!-- speed: written by bench.py -->", "<!-- end of speed -->"
COLUMNS = (
    *("gpu", "op", "shape", "dtype", "direction", "ms", "p90_ms", "rate", "unit", "of_ceiling"),
    *("torch_ms", "torch_x", "eager_x", "liger_x", "flash_attn_x", "mib", "torch_mib"),
    *("timed", "torch", "triton", "driver"),
)
PEERS = ("torch", "eager", "liger", "flash_attn")
# Files whose tests come first, where there is time for some only: what most of the time goes into.
FIRST = ("linear", "decode_attention", "attention", "sample", "log_mel", "cross_entropy")
Row = dict[str, str]


def set_up(device: str) -> None:
    """Paths, and on the CPU Triton's interpreter: before torch looks for a GPU."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for folder in (ROOT, ROOT / "kernels", ROOT / "tests", Path(__file__).parent):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    try:
        import interpreter
    except ImportError as error:
        from qwen2audio_core import install

        raise SystemExit(
            f"error: the ops are tested first, which needs {error.name}: {install.extra('test')}"
        ) from error
    if interpreter.DEVICE.type != device:
        raise SystemExit(f"error: --device {device} was asked for, torch sees {interpreter.DEVICE}")


def tests_pass(files: set[str], device: str, deadline: float = float("inf")) -> dict[str, bool]:
    """Run the tests of each op's file on the device; file -> whether they are green.

    Most of the time on a GPU is compiling, which the cores share if pytest-xdist is there: several
    files at once, each among several processes.

    deadline  of time.perf_counter(); a file whose tests are not done by then is left out
    """
    environment, workers, at_once = dict(os.environ), 1, 1
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif find_spec("xdist"):
        cores = os.cpu_count() or 1
        workers, at_once = min(4, cores), max(1, cores // 4)
    waiting = sorted(files, key=lambda file: (FIRST.index(file) if file in FIRST else 99, file))
    running: dict[str, tuple[subprocess.Popen[str], IO[str]]] = {}
    green = {}
    try:
        while (waiting or running) and time.perf_counter() < deadline:
            while waiting and len(running) < at_once:
                file = waiting.pop(0)
                command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
                command += ["-n", str(workers)] if workers > 1 else []
                print(f"testing {file}", flush=True)
                said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe would fill up
                tests = subprocess.Popen(
                    [*command, f"tests/test_op_{file}.py"], cwd=ROOT, env=environment, text=True,
                    start_new_session=True, stdout=said, stderr=subprocess.STDOUT,
                )  # fmt: skip
                running[file] = tests, said
            time.sleep(0.02)
            for file, (tests, said) in list(running.items()):
                if tests.poll() is None:
                    continue
                del running[file]
                green[file] = tests.returncode == 0
                if not green[file]:
                    said.seek(0)
                    print(said.read()[-3000:])
                said.close()
    finally:  # the time is over, or Ctrl-C, which they do not get
        for file, (tests, said) in running.items():
            os.killpg(tests.pid, signal.SIGKILL)  # the processes it shares the work with, too
            tests.wait()
            said.close()
            print(f"    {file}: not done in time")
    return green


# --- one case -----------------------------------------------------------------------------------


def draw(case: Any, device: str, dtype: Any) -> dict[str, Any]:
    """Inputs of a case, made on the device and rounded; the same ones every time."""
    import torch

    torch.manual_seed(0)
    with torch.device(device):
        inputs = case.inputs()
    return {
        name: x.to(dtype) if x.is_floating_point() and name not in case.exact else x
        for name, x in inputs.items()
    }


def verify(case: Any, device: str, dtype: Any) -> None:
    """AssertionError unless the kernel keeps the three-way rule (or its own) at this shape."""
    from tolerance import three_way

    inputs = draw(case, device, dtype)
    if case.check is not None:
        case.check(inputs)
        return
    fixed = {name: inputs.pop(name) for name in case.exact if name in inputs}
    kernel, plain = partial(case.kernel, **fixed), partial(case.plain, **fixed)
    three_way(kernel, plain, dtype, inputs, case.gradients)


class Arm:
    """One function on several copies of its inputs, ready to be timed."""

    def __init__(
        self, function: Callable[..., Any], copies: list[dict], gradients: tuple[str, ...]
    ):
        self.function, self.gradients = function, gradients
        self.copies = copies
        self.graph: Any = None
        self.calls = len(copies)

    def once(self, inputs: dict[str, Any]) -> None:
        import torch

        if not self.gradients:
            with torch.no_grad():
                self.function(**inputs)
            return
        leaves = {k: x.detach().requires_grad_(k in self.gradients) for k, x in inputs.items()}
        outputs = self.function(**leaves)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        torch.autograd.grad(
            outputs, [leaves[name] for name in self.gradients], [y.detach() for y in outputs]
        )

    def every(self) -> None:
        for i in range(self.calls):
            self.once(self.copies[i % len(self.copies)])

    def prepare(self, device: str, record: bool) -> float:
        """Compile, warm up, record; returns the MiB that a call allocates at most."""
        import torch

        if device == "cpu":
            self.once(self.copies[0])
            return 0.0
        self.once(self.copies[0])
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        began = time.perf_counter()
        self.once(self.copies[0])
        torch.cuda.synchronize()
        # At least 20 calls in a sample, unless they take long.
        if time.perf_counter() - began < 2e-3:
            self.calls = max(self.calls, 20)
        mib = (torch.cuda.max_memory_allocated() - before) / 2**20
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # as PyTorch asks for before recording a backward pass
            for _ in range(3):
                self.once(self.copies[0])
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        if record:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.every()
            self.graph = graph
        return mib

    def sample(self, device: str) -> float:
        """Milliseconds of one call, averaged over one pass through the copies."""
        import torch

        run = self.every if self.graph is None else self.graph.replay
        if device == "cpu":
            began = time.perf_counter()
            run()
            return (time.perf_counter() - began) * 1e3 / self.calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / self.calls


def copies_of(case: Any, device: str, dtype: Any) -> list[dict[str, Any]]:
    """Copies of the inputs that the GPU's cache cannot hold at once: four times its size."""
    import torch

    first = draw(case, device, dtype)
    if device == "cpu":
        return [first]
    size = sum(x.numel() * x.element_size() for x in first.values())
    cache = 4 * torch.cuda.get_device_properties(0).L2_cache_size
    wanted = min(max(1, -(-cache // size)), 256)
    # Copies, not draws: the values do not matter.
    return [first, *({k: x.clone() for k, x in first.items()} for _ in range(wanted - 1))]


def alternate(arms: dict[str, Arm], device: str, samples: int) -> dict[str, list[float]]:
    """Samples of every arm in the order A B ... then ... B A, so that drift falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(samples):
        for name in list(arms)[:: 1 if number % 2 == 0 else -1]:
            times[name].append(arms[name].sample(device))
    return times


def race(case: Any, direction: str, device: str, dtype: Any, samples: int) -> dict[str, Any]:
    """{"times": {arm: [ms]}, "mib": {arm: MiB}, "timed": how, "dtype": of the inputs}."""
    gradients = case.gradients if direction == "both" else ()
    copies = copies_of(case, device, dtype)
    theirs = [case.peer_inputs(inputs) for inputs in copies]
    functions = {"kernel": case.kernel, **case.peers}
    inputs = {"kernel": copies, **dict.fromkeys(case.peers, theirs)}
    if "liger" in case.peers:  # it writes gradients over the tensors it is given
        inputs["liger"] = [{k: x.clone() for k, x in one.items()} for one in theirs]
    record = case.graph and device != "cpu"
    while True:
        arms = {name: Arm(f, inputs[name], gradients) for name, f in functions.items()}
        mib: dict[str, float] = {}
        try:
            for name in list(arms):
                mib[name] = arms[name].prepare(device, record)
            break
        except Exception as error:
            if name in ("kernel", "torch") and not record:
                raise
            problem = str(error).splitlines()[0] if str(error) else type(error).__name__
            if record and name in ("kernel", "torch"):
                print(f"    {name} cannot be recorded in a graph, all arms are called: {problem}")
                record = False
            else:
                print(f"    {name} cannot run here: {problem}")
                del functions[name]
    times = alternate(arms, device, samples)
    dtype = next(x.dtype for x in copies[0].values() if x.is_floating_point())
    return {
        "times": times,
        "mib": mib,
        "timed": "graph" if record else "calls",
        "dtype": str(dtype).removeprefix("torch."),
    }


def row_of(
    case: Any, direction: str, found: dict[str, Any], machine: Row, ceilings: dict[str, float]
) -> Row:
    """One line of the results."""
    times = found["times"]
    ms = statistics.median(times["kernel"])
    work = case.work if direction == "forward" else case.work_both
    unit, scale = ("TFLOP/s", 1e12) if case.ceiling == "matmul" else ("GB/s", 1e9)
    rate = work / (ms * 1e-3) / scale
    row = {
        **machine,
        "op": case.op,
        "shape": case.shape,
        "dtype": found["dtype"],
        "direction": direction,
        "ms": f"{ms:.4g}",
        "p90_ms": f"{p90(times['kernel']):.4g}",
        "rate": f"{rate:.4g}",
        "unit": unit,
        "of_ceiling": f"{rate / ceilings[case.ceiling]:.0%}",
        "mib": f"{found['mib']['kernel']:.0f}",
        "torch_mib": f"{found['mib']['torch']:.0f}",
        "torch_ms": f"{statistics.median(times['torch']):.4g}",
        "timed": found["timed"],
    }
    for peer in PEERS:
        if peer in times:
            row[f"{peer}_x"] = f"{statistics.median(times[peer]) / ms:.3g}"
    return {name: row.get(name, "") for name in COLUMNS}


def p90(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, round(0.9 * (len(values) - 1)))]


# --- the machine --------------------------------------------------------------------------------


def measure_ceilings(device: str, quick: bool) -> dict[str, float]:
    """What this machine reaches: GB/s of reading and of copying (read + write), TFLOP/s in bf16."""
    import torch

    size = 2**16 if quick else 2**30  # float32 numbers: 4 GiB
    x = torch.randn(size, device=device)
    y = torch.empty_like(x)
    side = 64 if quick else 8192
    a, b = torch.randn(2, side, side, device=device).bfloat16()  # random: zeros run faster
    runs = {
        "read": (lambda: x.sum(), 4 * size / 1e9),
        "copy": (lambda: y.copy_(x), 8 * size / 1e9),
        "matmul": (lambda: a @ b, 2 * side**3 / 1e12),
    }
    ceilings = {}
    for name, (run, work) in runs.items():
        arm = Arm(run, [{}], ())
        arm.prepare(device, record=False)
        arm.calls = 3
        ceilings[name] = work / (min(arm.sample(device) for _ in range(7)) * 1e-3)
    return ceilings


def machine() -> Row:
    import torch
    import triton

    driver = "interpreter"
    name = "cpu"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.sm,clocks.mem",
            "--format=csv,noheader",
        ]
        try:
            driver = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[0]
        except (OSError, IndexError):
            driver = f"ROCm {torch.version.hip}" if torch.version.hip else "unknown"
    return {
        "gpu": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "driver": driver.replace(",", ";"),
    }


# --- results ------------------------------------------------------------------------------------


def ceiling_rows(ceilings: dict[str, float], here: Row) -> list[Row]:
    units = {"matmul": "TFLOP/s"}
    return [
        {
            **dict.fromkeys(COLUMNS, ""),
            **here,
            "op": f"ceiling: {name}",
            "rate": f"{rate:.4g}",
            "unit": units.get(name, "GB/s"),
        }
        for name, rate in ceilings.items()
    ]


def keep(rows: list[Row], folder: Path, ops: set[str]) -> Path:
    """Write the rows of one GPU, in place of what `ops` had; rows of other ops stay."""
    path = folder / f"{rows[0]['gpu'].lower().replace(' ', '_')}.csv"
    old = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    rest = [r for r in old if r["op"] not in ops and not r["op"].startswith("ceiling")]
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*rows, *rest], key=lambda r: r["op"]))
    return path


def table(folder: Path) -> str:
    """The README's section: a table for every GPU with results, or that there is none."""
    files = sorted(folder.glob("*.csv")) if folder.is_dir() else []
    if not files:
        return (
            "No GPU has measured these kernels yet: `results/` holds no file, so no speed is "
            "claimed here.\n"
        )
    parts = []
    for file in files:
        rows = list(csv.DictReader(file.open(newline="")))
        first = rows[0]
        parts.append(
            f"**{first['gpu']}** (torch {first['torch']}, Triton {first['triton']}, driver and "
            f"clocks {first['driver']})\n"
        )
        limits = [r for r in rows if r["op"].startswith("ceiling: ")]
        if limits:
            reached = ", ".join(f"{r['op'][9:]} {r['rate']} {r['unit']}" for r in limits)
            parts.append(f"Measured ceilings: {reached}.\n")
        heads = (
            *("op", "shape", "type, direction", "ms (90 %)", "rate", "of ceiling", "x torch"),
            *("x eager", "x Liger", "x flash-attn", "MiB, torch's"),
        )
        parts.append(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
        parts += [
            f"| {r['op']} | {r['shape']} | {r['dtype']}, {r['direction']} | {r['ms']} "
            f"({r['p90_ms']}) | {r['rate']} {r['unit']} | {r['of_ceiling']} | {r['torch_x']} "
            f"| {r['eager_x']} | {r['liger_x']} | {r['flash_attn_x']} "
            f"| {r['mib']}, {r['torch_mib']} |"
            for r in rows
            if not r["op"].startswith("ceiling")
        ]
        parts.append("")
    return "\n".join(parts)


def write_table(readme: Path, folder: Path) -> None:
    """Replace what stands between the markers of the README."""
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"error: {readme} must hold the lines {BEGIN} and {END} once each")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    readme.write_text(f"{head}{BEGIN}\n{table(folder)}{END}{tail}", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few samples")
    parser.add_argument("--ops", help="comma-separated; all otherwise")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--samples", type=int, help="timed samples an arm (20; 2 with --quick)")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds, behind which nothing begins"
    )
    parser.add_argument("--tune", action="store_true", help="remake tuned.json for this GPU")
    parser.add_argument("--table", action="store_true", help="only rewrite the README's table")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--readme", type=Path, default=README)
    arguments = parser.parse_args(argv)
    if arguments.table:
        write_table(arguments.readme, arguments.results)
        return 0
    device = arguments.device
    if device == "cpu" and not arguments.quick:
        parser.error("--device cpu goes with --quick: the interpreter's speed means nothing")
    set_up(device)
    return bench(arguments, device)


def bench(arguments: argparse.Namespace, device: str) -> int:
    import shapes
    import torch

    import qwen2audio_kernels as kernels

    dtype = getattr(torch, arguments.dtype)
    every = list(shapes.cases(arguments.quick, torch.finfo(dtype).bits))
    wanted = set(arguments.ops.split(",")) if arguments.ops else {case.op for case in every}
    unknown = wanted - {case.op for case in every}
    if unknown:
        first = sorted(unknown)[0]
        if first in kernels.OPS:
            raise SystemExit(f"error: {first} has no Case in kernels/benchmarks/shapes.py")
        raise SystemExit(f"error: no op {first!r}, choose from {sorted(kernels.OPS)}")
    began = time.perf_counter()
    green = tests_pass({kernels.OPS[op] for op in wanted}, device, began + arguments.budget / 2)
    late = {op for op in wanted if kernels.OPS[op] not in green}
    wanted -= late
    chosen = [case for case in every if case.op in wanted]
    red = {op for op in wanted if not green[kernels.OPS[op]]}
    for op in sorted(red):
        print(f"REFUSED {op}: tests/test_op_{kernels.OPS[op]}.py fails, so it gets no speed")
    chosen = [case for case in chosen if case.op not in red]
    samples = arguments.samples or (2 if arguments.quick else 20)
    if arguments.tune:
        import tune

        tune.tune(chosen, device, dtype, samples, write=device == "cuda" and not arguments.quick)
    here, ceilings = machine(), measure_ceilings(device, arguments.quick)
    rows, failed = ceiling_rows(ceilings, here), set(red)
    kept = device == "cuda" and not arguments.quick
    ran: set[str] = set()
    for case in chosen:
        if time.perf_counter() - began > arguments.budget:
            late.add(case.op)
            continue
        for direction in ("forward", "both") if case.gradients else ("forward",):
            print(f"{case.op}, {case.shape}, {direction}", flush=True)
            try:
                if direction == "forward":
                    verify(case, device, dtype)
                found = race(case, direction, device, dtype, samples)
            except torch.cuda.OutOfMemoryError:
                print("    left out: not enough memory")
                break
            except Exception as error:  # one kernel's trouble is no other's
                line = (str(error).splitlines() or [""])[0]
                print(f"REFUSED {case.op}, {case.shape}: {type(error).__name__}: {line}")
                failed.add(case.op)
                break
            rows.append(row_of(case, direction, found, here, ceilings))
            if device == "cuda":
                report(rows[-1])
                torch.cuda.empty_cache()
        ran.add(case.op)
        rows = [row for row in rows if row["op"] not in failed]
        if kept:  # whatever may end the run later
            keep(rows, arguments.results, ran)
        if case.op in failed and not answers(device):
            print(f"left out, the GPU answers no more: {sorted({c.op for c in chosen} - ran)}")
            break
    if kept:
        print(f"wrote {keep(rows, arguments.results, ran | red)}")
        write_table(arguments.readme, arguments.results)
    else:
        print(f"{len(rows) - len(ceilings)} cases went through; no speed is kept of a quick run")
    if late:
        print(f"left out, the budget of {arguments.budget:.0f} s was spent: {sorted(late)}")
    return 1 if failed else 0


def answers(device: str) -> bool:
    """Whether the GPU still works: after some faults every later call fails as well."""
    import torch

    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True


def report(row: Row) -> None:
    ratios = ", ".join(f"{peer} x {row[f'{peer}_x']}" for peer in PEERS if row[f"{peer}_x"])
    print(f"    {row['ms']} ms  {row['rate']} {row['unit']}  {row['of_ceiling']}  {ratios}")


if __name__ == "__main__":
    sys.exit(main())
