"""Packed linear layers: what F.linear gives, and never a stale weight."""

import copy
import ctypes
import os
import pickle
import platform
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F

from qwen2audio_core import backends, terminal, tiny, weights
from qwen2audio_core.errors import InputError
from qwen2audio_core.linear import Linear
from qwen2audio_core.model import Qwen2Audio
from qwen2audio_core.packed_linear import PackedLinear, limit_shapes, why_not_packed
from qwen2audio_core.training import loop

WEIGHT = torch.randn(96, 80, generator=torch.Generator().manual_seed(0)).bfloat16()
needs_bf16 = pytest.mark.skipif(
    bool(why_not_packed(WEIGHT)), reason=f"cannot pack here: {why_not_packed(WEIGHT)}"
)


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()


@needs_bf16
@pytest.mark.parametrize("rows", [(1,), (7,), (2, 33), (300,)])
@pytest.mark.parametrize("bias", [None, WEIGHT[:, 0].clone()], ids=["plain", "bias"])
def test_the_same_bits(rows, bias):
    x = random(*rows, 80)
    with torch.no_grad():
        ours, theirs = PackedLinear()(x, WEIGHT, bias), F.linear(x, WEIGHT, bias)
    if platform.machine() in ("x86_64", "AMD64"):
        assert torch.equal(ours, theirs)
    else:
        exact = F.linear(x.double(), WEIGHT.double(), None if bias is None else bias.double())
        assert (ours - exact).norm() <= 1.02 * (theirs - exact).norm()


@needs_bf16
@pytest.mark.parametrize("rows", [1, 24, 115, 300])
def test_long_sums_are_as_exact(rows):
    """The same bits, or as far from float64, which is what rounding to bfloat16 is."""
    weight, x = random(192, 4096), random(rows, 4096).roll(1)
    with torch.no_grad():
        ours, theirs = PackedLinear()(x, weight), F.linear(x, weight)
    exact = x.double() @ weight.double().T

    def error(y):
        return (y - exact).norm() / exact.norm()

    assert error(ours) <= 1.02 * error(theirs) and error(ours) < 2**-9
    assert error(F.linear(x, weight.roll(1, 0))) > 0.1


def packed_layer():
    layer = Linear(80, 96).bfloat16()
    layer.linear_op = PackedLinear()
    return layer


@needs_bf16
def test_a_changed_weight_is_packed_anew():
    layer = packed_layer()
    x = random(3, 80)
    with torch.no_grad():
        before = layer(x)
        layer.weight.mul_(2)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        layer.weight.data = WEIGHT.clone()
        after = layer(x)
        assert torch.equal(after, F.linear(x, WEIGHT, layer.bias))
        assert not torch.equal(after, before)


@needs_bf16
def test_what_cannot_be_packed_any_more_runs_as_it_is():
    layer = packed_layer()
    x = random(3, 80)
    with torch.no_grad():
        expected = layer(x)
        for dtype in (torch.float64, torch.float16, torch.float32):
            layer.to(dtype)
            assert torch.equal(layer(x.to(dtype)), F.linear(x.to(dtype), layer.weight, layer.bias))
        assert torch.equal(layer.bfloat16()(x), expected)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert twin.linear_op is not layer.linear_op and torch.equal(twin(x), expected)


@needs_bf16
def test_two_threads_may_pack_at_once():
    weights = [random(96, 80) + i for i in range(2)]
    x = random(3, 80)
    expected = [F.linear(x, weight) for weight in weights]
    slot, wrong = PackedLinear(), []

    def work(i):
        with torch.inference_mode():
            for _ in range(300):  # each finds what the other has packed
                try:
                    if not torch.equal(slot(x, weights[i]), expected[i]):
                        wrong.append(i)
                except Exception as error:
                    wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1, 0)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong


@needs_bf16
def test_gradients_pass_as_without_it():
    layer = packed_layer()
    x = random(3, 80).requires_grad_()
    layer(x).sum().backward()
    assert layer.weight.grad is not None and x.grad is not None
    layer.requires_grad_(False)
    layer(x.detach())


@needs_bf16
def test_the_whole_model_packed():
    torch.manual_seed(0)
    model = Qwen2Audio(tiny.TINY).bfloat16().eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = model(ids)
        with backends.use(model, linear="packed") as handle:
            assert handle.chosen == {"linear": "packed"}
            slots = [m.linear_op for m in model.modules() if isinstance(m, Linear)]
            assert len({id(slot) for slot in slots}) == len(slots) > 10  # one for each layer
            assert torch.equal(model(ids), expected)
            assert torch.equal(copy.deepcopy(model)(ids), expected)
        assert all(m.linear_op is F.linear for m in model.modules() if isinstance(m, Linear))
        assert backends.use(model, "auto").chosen["linear"] == "packed"


def test_where_it_does_not_pay():
    model = Qwen2Audio(tiny.TINY)
    with pytest.raises(InputError, match="packing gains nothing in float32"):
        backends.use(model, linear="packed")
    assert backends.use(model, "auto").chosen["linear"] == "torch"
    assert "weights are on meta" in why_not_packed(torch.empty(1, device="meta"))


# --- what oneDNN keeps of every shape -------------------------------------------------------------

CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
# Prints the MiB that the second 100 numbers of rows leave allocated, beside the first 100.
SHAPES = """
import ctypes, sys, torch
from qwen2audio_core.packed_linear import PackedLinear, limit_shapes
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in names]
mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Info
if sys.argv[1] == "limited":
    limit_shapes(16)
torch.set_num_threads(1)
layer, weight, used = PackedLinear(), torch.ones(64, 64).bfloat16(), 0
with torch.no_grad():
    for rows in range(1, 201):
        layer(torch.ones(rows, 64).bfloat16(), weight)
        if rows == 100:
            used = mallinfo2().uordblks
print((mallinfo2().uordblks - used) / 2**20)
"""


@needs_bf16
def test_shapes_do_not_pile_up():
    """With the opposite, so that the test would see them."""
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("needs mallinfo2, of glibc 2.33 or newer")
    environment = {name: value for name, value in os.environ.items() if name not in CAPACITIES}
    grown = {}
    running = {
        kind: subprocess.Popen(
            [sys.executable, "-c", SHAPES, kind], env=environment, stdout=subprocess.PIPE, text=True
        )
        for kind in ("limited", "unlimited")
    }
    for kind, process in running.items():
        grown[kind] = float(process.communicate(timeout=60)[0])
        assert process.returncode == 0
    assert abs(grown["limited"]) < 2 and grown["unlimited"] > 20, grown


def test_commands_limit_shapes_unless_told_otherwise(monkeypatch):
    class Reached(Exception):
        pass

    def reached(*arguments, **options):
        raise Reached([os.environ.get(name) for name in CAPACITIES])

    monkeypatch.setattr("qwen2audio_core.assistant.load", reached)
    monkeypatch.setattr("qwen2audio_core.training.loop.read_rows", reached)
    for name in CAPACITIES:
        monkeypatch.setenv(name, "7")  # and as it was, after the test
    monkeypatch.delenv(CAPACITIES[0])
    with pytest.raises(Reached) as seen:
        terminal.load("tiny")
    assert seen.value.args == (["128", "7"],)
    monkeypatch.delenv(CAPACITIES[0])
    with pytest.raises(Reached) as seen:
        loop.train(loop.Settings("tiny", ["rows.jsonl"], "out", device="cpu"))
    assert seen.value.args == (["128", "7"],)
    monkeypatch.delenv(CAPACITIES[0])
    limit_shapes(9)
    assert [os.environ[name] for name in CAPACITIES] == ["9", "7"]


def test_weights_are_drawn_but_not_on_the_meta_device(monkeypatch):
    torch.manual_seed(0)
    model = Qwen2Audio(tiny.TINY)
    for name, parameter in model.named_parameters():
        norm = "norm" in name  # those begin with ones and zeros
        assert norm or parameter.std() > 0.01, name
    torch.manual_seed(0)
    plain = torch.nn.Linear(5, 7)
    torch.manual_seed(0)
    assert torch.equal(Linear(5, 7).weight, plain.weight)
    for kind in (torch.nn.Linear, torch.nn.LayerNorm, torch.nn.Embedding):
        monkeypatch.setattr(kind, "reset_parameters", lambda self: pytest.fail(f"{self} is drawn"))
    shape = weights.without_storage(tiny.TINY)
    assert all(parameter.is_meta for parameter in shape.parameters())
    assert {n: p.shape for n, p in shape.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }


def test_a_model_without_storage_imports_no_compiler():
    """As one with the embedding of torch 2.11 does, and takes seconds for it."""
    script = (
        "import sys; from qwen2audio_core import tiny, weights;"
        " weights.without_storage(tiny.TINY); print('torch._dynamo' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]
