"""What the interpreter refuses in the tests of kernels, although it would run."""

import pytest
import torch
from interpreter import DEVICE, interpreter, tl
from triton import jit

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the interpreter is not used on a GPU")


@jit
def copy_kernel(x_ptr, y_ptr, READ: tl.constexpr, WRITE: tl.constexpr):
    i = tl.arange(0, 8)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < READ), mask=i < WRITE)


def copied(dtype: torch.dtype, read: int, write: int) -> torch.Tensor:
    x, y = torch.ones(5, dtype=dtype), torch.full((5,), 7).to(dtype)
    copy_kernel[(1,)](x, y_ptr=y, READ=read, WRITE=write)
    return y


def test_a_kernel_that_keeps_to_its_tensors() -> None:
    assert copied(torch.float32, 5, 5).tolist() == [1] * 5
    assert copied(torch.float32, 5, 3).tolist() == [1, 1, 1, 7, 7]


@pytest.mark.parametrize(("read", "write", "verb"), [(6, 5, "reads 1"), (5, 7, "writes 2")])
def test_places_outside_every_tensor(read: int, write: int, verb: str) -> None:
    with pytest.raises(Exception, match=f"the kernel {verb} places outside every tensor") as caught:
        copied(torch.float32, read, write)
    assert isinstance(caught.value, (AssertionError, interpreter.InterpreterError))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_a_masked_load_leaves_out_is_nan(dtype: torch.dtype) -> None:
    y = copied(dtype, 3, 5)
    assert y[:3].tolist() == [1] * 3 and y[3:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_or_minus_one(dtype: torch.dtype) -> None:
    assert copied(dtype, 3, 5).tolist() == [1, 1, 1, -1, -1]
