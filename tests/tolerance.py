"""The three-way rule: how close a kernel has to be, with no hand-tuned number.

A kernel K, the plain op P in the same dtype, and the plain op in float64, R, run on the same
values:

    err(K, R) <= 2 * err(P, R) + floor

for every output and every gradient, by name, once with the largest error and once with the root
mean square of the errors. The floor is one unit in the last place of the dtype at the same
measure (the largest, the root mean square) of R, since P may be exact by luck where K rounds
once. In float32 on a GPU it is eight: there a library cuts a long sum into slices, which rounds
several times less than K's sum in one go, and by how much depends on the shape.

The kernel runs with uninitialised memory filled with NaN (integers: the largest value), so an
element that it never wrote, or read before writing, cannot pass for zero.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@contextmanager
def poison() -> Iterator[None]:
    """torch.empty and its kin return NaN; PyTorch does it itself in its deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)


def three_way(
    kernel: Callable[..., Tensor | tuple[Tensor, ...]],
    plain: Callable[..., Tensor | tuple[Tensor, ...]],
    dtype: torch.dtype,
    inputs: dict[str, Tensor],
    gradients: tuple[str, ...] | None = None,
) -> dict[str, tuple[float, float]]:
    """Check a kernel against its plain op by the rule above; raise AssertionError where it fails.

    kernel, plain  called with `inputs` by name, so a test of a view passes a lambda that takes the
                   whole tensor and hands the view on
    dtype          floating inputs are rounded to it first: the rounded values are everyone's inputs
    gradients      names to differentiate by; None for every floating input, () for forward only
    returns        name -> largest error of kernel and of plain, "d<name>" for gradients
    """
    floating = [name for name, value in inputs.items() if value.is_floating_point()]
    names = tuple(floating) if gradients is None else gradients
    inputs = {k: v.to(dtype) if k in floating else v for k, v in inputs.items()}
    upstream: list[Tensor] = []  # the same random gradient for the three, drawn on the first run

    def run(function: Callable, wide: bool) -> dict[str, Tensor]:
        leaves = {
            name: value.to(torch.float64 if wide and name in floating else value.dtype)
            .clone()
            .requires_grad_(name in names)
            for name, value in inputs.items()
        }
        outputs = function(**leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
        if names:
            if not upstream:
                generator = torch.Generator().manual_seed(1)
                for y in outputs:
                    draw = torch.randn(y.shape, generator=generator, dtype=torch.float64)
                    upstream.append(draw.to(y.device, y.dtype))
            gradient = torch.autograd.grad(
                outputs,
                [leaves[name] for name in names],
                [g.to(y.dtype) for g, y in zip(upstream, outputs, strict=True)],
            )
            found |= {f"d{name}": g for name, g in zip(names, gradient, strict=True)}
        return found

    theirs = run(plain, wide=False)
    exact = run(plain, wide=True)
    with poison():
        ours = run(kernel, wide=False)
    assert ours.keys() == theirs.keys(), f"kernel returns {list(ours)}, plain {list(theirs)}"
    return {name: _compare(name, ours[name], theirs[name], exact[name], dtype) for name in ours}


def _compare(
    name: str, ours: Tensor, theirs: Tensor, exact: Tensor, dtype: torch.dtype
) -> tuple[float, float]:
    assert ours.shape == theirs.shape, f"{name}: shape {ours.shape}, expected {theirs.shape}"
    assert ours.dtype == theirs.dtype, f"{name}: dtype {ours.dtype}, expected {theirs.dtype}"
    if not ours.numel():
        return 0.0, 0.0
    assert exact.isfinite().all(), f"{name}: the reference is not finite, choose other inputs"
    assert ours.isfinite().all(), f"{name}: {(~ours.isfinite()).sum()} of {ours.numel()} not finite"
    our_error, their_error = (ours.double() - exact).abs(), (theirs.double() - exact).abs()
    for measure, of in (("largest", Tensor.max), ("root mean square", _rms)):
        scale = of(exact.abs()).clamp(min=torch.finfo(dtype).tiny)  # below it, steps are constant
        units = 8 if dtype == torch.float32 and ours.is_cuda else 1
        floor = units * torch.finfo(dtype).eps * scale
        limit = 2 * of(their_error) + floor
        assert of(our_error) <= limit, (
            f"{name}: {measure} error {of(our_error):.3e}, allowed {limit:.3e} = "
            f"2 x {of(their_error):.3e} (torch) + {floor:.3e} ({units} x the last place)"
        )
    return our_error.max().item(), their_error.max().item()


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()
