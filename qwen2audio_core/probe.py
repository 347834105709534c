"""Look inside a model and reach into it, from outside: the model's own code knows nothing of it.

    with probe.record(model, "language_model.model.layers.*.mlp") as seen: ...     outputs, by name
    with probe.attention_maps(model, "language_model.model.layers.0-3") as maps: ...
    with probe.hooks(model, {"blocks.2.hook_resid_post": function}): ...           and change them
    with probe.steer(model, "blocks.2.hook_resid_post", vector): ...               patch, ablate
    logits, cache = probe.run_with_cache(model, batch, "blocks.*.hook_resid_post")
    lens = probe.logit_lens(model, batch, positions=[-1])

points.py explains the names. They work while the model runs by its modules, so with forward,
generate() and everything built on that, under any backend; the engine runs the weights by itself.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qwen2audio_core.chat import Batch
from qwen2audio_core.errors import InputError
from qwen2audio_core.model import Qwen2Audio
from qwen2audio_core.points import TABLE as TABLE
from qwen2audio_core.points import Change, Point, points, watched
from qwen2audio_core.points import names as names

Positions = slice | Sequence[int] | Sequence[bool] | Tensor | int | None

_UNSEEN = (
    "no tensor passed {}: call the model, generate() or ask() inside the block. The Engine, and"
    " what was compiled or exported before, run the weights without their modules and cannot be"
    " looked into"
)


@contextmanager
def hooks(model: nn.Module, changes: Mapping[str, Change]) -> Iterator[None]:
    """Call change(tensor, point) for what passes at each name; what it returns takes its place.

    changes   name or pattern -> function; returning None leaves the tensor as it is
    errors    InputError at the end of the block if a function was never called
    """
    called: dict[str, bool] = {}

    def once(change: Change) -> Change:
        def tell(x: Tensor, point: Point) -> Tensor | None:
            called[point.name] = True
            return change(x, point)

        return tell

    with ExitStack() as stack:
        for pattern, change in changes.items():
            for point in points(model, pattern):
                called.setdefault(point.name, False)
                stack.enter_context(watched(point, once(change)))
        yield
    silent = [name for name, was in called.items() if not was]
    if silent:
        raise InputError(_UNSEEN.format(silent[0]))


class Seen(dict[str, Tensor]):
    """What was recorded: name -> tensor of the last call. `calls[name]` holds those of all.

    seen["blocks.3.hook_resid_post"], or as TransformerLens abbreviates it, seen["resid_post", 3].
    """

    def __init__(self, points: Sequence[Point] = ()):
        super().__init__()
        self.calls: dict[str, list[Tensor]] = {}
        self._names = [point.name for point in points]

    @property
    def bytes(self) -> int:
        """Memory that the recorded tensors take."""
        kept = [x for calls in self.calls.values() for x in calls] or list(self.values())
        return sum(x.numel() * x.element_size() for x in kept)

    def __getitem__(self, name: str | tuple[str, int]) -> Tensor:
        if isinstance(name, tuple):
            short, number = name
            fitting = (f"blocks.{number}.hook_{short}", f"blocks.{number}.attn.hook_{short}",
                       f"blocks.{number}.mlp.hook_{short}")  # fmt: skip
            name = next((full for full in fitting if full in self._names), fitting[0])
        return super().__getitem__(name)

    def __missing__(self, name: str) -> Tensor:
        if name in self._names:
            raise InputError(_UNSEEN.format(name))
        some = ", ".join(self._names[:3]) + (", ..." if len(self._names) > 3 else "")
        raise KeyError(f"{name} was not recorded, only {some}")


@contextmanager
def record(
    model: nn.Module,
    patterns: str | Iterable[str],
    *,
    positions: Positions = None,
    all_calls: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    detach: bool = True,
) -> Iterator[Seen]:
    """Keep what passes at the named points, and nothing else.

    patterns    names as above, one or several
    positions   of the sequence to keep, counted from the batch's first column, padding included,
                also while a cache is in use: a slice, a list of numbers or a mask of bools; None
                for all. (Of the audio tower: frames.)
    all_calls   keep every call's tensor, such as every token's while generating, in `seen.calls`
    device      where to keep it, None for where it is; dtype likewise
    detach      False keeps the graph, for gradients; else copies, which nothing changes any more
    returns     Seen, filled while the block runs
    """
    wanted, named = points(model, patterns), _listed(positions)
    seen = Seen(wanted)

    def keep(x: Tensor, point: Point) -> None:
        if named is not None:
            at = _columns(named, x.shape[point.axis], start.of(point), x.device)
            if not len(at):
                return
            x = x.index_select(point.axis, at)
        if detach:
            with torch.inference_mode(False):  # copies that gradients may pass through later
                x = x.detach().to(device or x.device, dtype or x.dtype, copy=True)
        else:
            x = x.to(device or x.device, dtype or x.dtype)
        if all_calls:
            seen.calls.setdefault(point.name, []).append(x)
        seen[point.name] = x

    with ExitStack() as stack:
        start = stack.enter_context(_counted(model))
        for point in wanted:
            stack.enter_context(watched(point, keep))
        yield seen


class _Start:
    """The first position of the tokens now read, for points of the decoder."""

    def __init__(self) -> None:
        self.column = 0
        self.decoder: set[nn.Module] = set()

    def of(self, point: Point) -> int:
        return self.column if point.module in self.decoder else 0


@contextmanager
def _counted(model: nn.Module) -> Iterator[_Start]:
    """Watch how many tokens the cache holds. The transformers model is taken to have none."""
    start = _Start()
    if not isinstance(model, Qwen2Audio):
        yield start
        return
    start.decoder = set(model.language_model.modules())

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("cache") if "cache" in kwargs else (args[3] if len(args) > 3 else None)
        start.column = cache.length if cache is not None else 0

    handle = model.language_model.model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield start
    finally:
        handle.remove()


def _listed(positions: Positions) -> slice | Sequence[int] | None:
    """Positions in any form, as a slice or their numbers."""
    if isinstance(positions, Tensor):
        positions = positions.tolist()
    if isinstance(positions, int):
        positions = [positions]
    if positions is None or isinstance(positions, slice):
        return positions
    if positions and isinstance(positions[0], bool):
        return [number for number, named in enumerate(positions) if named]
    return positions


def _columns(
    positions: slice | Sequence[int] | None, length: int, start: int, device: torch.device
) -> Tensor:
    """Which of a call's `length` positions, of which the first is number `start`, are named."""
    if positions is None:
        return torch.arange(length, device=device)
    if isinstance(positions, slice):
        # What lies behind the call has an end of its own: -1 is the last one of this call.
        named = range(*positions.indices(start + length))
    else:
        named = [p + start + length if p < 0 else p for p in positions]  # type: ignore[assignment]
    inside = [p - start for p in named if start <= p < start + length]
    return torch.tensor(inside, dtype=torch.long, device=device)


@contextmanager
def attention_maps(
    model: Qwen2Audio,
    layers: str | Iterable[str] = "language_model.model.layers.*",
    *,
    positions: Positions = None,
    all_calls: bool = False,
    device: torch.device | str | None = "cpu",
    dtype: torch.dtype | None = None,
) -> Iterator[Seen]:
    """Keep the attention weights of the named layers, which run the written-out attention for it.

    layers   paths of layers, or of the attention modules themselves
    returns  Seen: "...self_attn:pattern" -> (B, H, T, S); positions select among the T queries.
             `bertviz` makes of it what BertViz draws
    The published model's 32 layers need 32 * 32 * T * S numbers; name layers, or positions.
    """
    chosen = [layers] if isinstance(layers, str) else list(layers)
    ended = [path if path.endswith("self_attn") else path + ".self_attn" for path in chosen]
    with record(
        model,
        [path + ":pattern" for path in ended],
        positions=positions,
        all_calls=all_calls,
        device=device,
        dtype=dtype,
    ) as seen:
        yield seen


def bertviz(maps: Seen) -> list[Tensor]:
    """Attention of each layer (1, H, T, S) as bertviz.head_view(attention, tokens) takes it."""
    if not maps:
        raise InputError(_UNSEEN.format("the attention layers"))
    return [weights[:1].detach().float().cpu() for weights in maps.values()]


@contextmanager
def patch(
    model: nn.Module, name: str, value: Tensor, *, positions: Positions = None
) -> Iterator[None]:
    """Put a value, such as one recorded in another run, in the place of what passes at a point.

    value   as recorded there: of a whole sequence, of the same positions, or of one position for
            all. Positions behind its end stay as they are
    """

    def change(x: Tensor, at: Tensor, first: int, axis: int) -> Tensor:
        given = value.to(x.device, x.dtype)
        if given.ndim != x.ndim:
            raise InputError(f"{name} is {tuple(x.shape)}, the value given is {tuple(value.shape)}")
        if given.shape[axis] not in (1, len(at)):
            at = at[at + first < given.shape[axis]]
            given = given.index_select(axis, at + first)
        target = list(x.shape)
        target[axis] = len(at)
        try:
            return x.index_copy(axis, at, given.expand(target))
        except RuntimeError as error:
            shape = tuple(value.shape)
            raise InputError(f"{name} is {tuple(x.shape)}, the value given is {shape}") from error

    with _changed(model, name, change, positions):
        yield


@contextmanager
def ablate(
    model: nn.Module,
    name: str,
    *,
    positions: Positions = None,
    heads: Sequence[int] | None = None,
    mean: bool = False,
) -> Iterator[None]:
    """Silence a point.

    heads   only these, of a point that is shown in heads (hook_q, hook_z, hook_pattern, ...)
    mean    put the mean over the call's positions there instead of zero
    """

    def change(x: Tensor, at: Tensor, first: int, axis: int) -> Tensor:
        filling = x.mean(axis, keepdim=True) if mean else x.new_zeros(())
        silent = x.index_copy(axis, at, filling.expand_as(x).index_select(axis, at))
        if heads is None:
            return silent
        head_axis = 1 if patterns else -2
        chosen = torch.tensor(list(heads), device=x.device)
        return x.index_copy(head_axis, chosen, silent.index_select(head_axis, chosen))

    found = points(model, name)
    patterns = any(point.side == "pattern" for point in found)
    if heads is not None and not all(p.head_dim or p.side == "pattern" for p in found):
        raise InputError(f"{name} has no heads: name hook_z, hook_q, hook_k, hook_v or a pattern")
    if mean and patterns:
        raise InputError(f"{name}: a mean of attention weights would look at later positions")
    with _changed(model, name, change, positions):
        yield


@contextmanager
def steer(
    model: nn.Module,
    name: str,
    vector: Tensor,
    scale: float = 1.0,
    *,
    positions: Positions = None,
) -> Iterator[None]:
    """Add scale * vector (D,) to what passes at a point, at each position or at some."""

    def change(x: Tensor, at: Tensor, first: int, axis: int) -> Tensor:
        added = (scale * vector).to(x.device, x.dtype)
        return x.index_copy(axis, at, x.index_select(axis, at) + added)

    with _changed(model, name, change, positions):
        yield


@contextmanager
def _changed(
    model: nn.Module,
    name: str,
    change: Callable[[Tensor, Tensor, int, int], Tensor],
    positions: Positions,
) -> Iterator[None]:
    """Call change(x, at, first, axis): `at` counts within the call, which begins at `first`."""
    named = _listed(positions)
    with _counted(model) as start:

        def tell(x: Tensor, point: Point) -> Tensor | None:
            first = start.of(point)
            at = _columns(named, x.shape[point.axis], first, x.device)
            return change(x, at, first, point.axis) if len(at) else None

        with hooks(model, {name: tell}):
            yield


# Running


def run(model: nn.Module, inputs: Batch | Mapping[str, Any]) -> Tensor:
    """Logits (B, T, V) of a batch, or of what transformers' processor returns."""
    if isinstance(inputs, Batch):
        logits: Tensor = model(inputs.ids, inputs.mel, inputs.conv_frames, inputs.attention_mask)
        return logits
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output.logits


def run_with_cache(
    model: nn.Module, inputs: Batch | Mapping[str, Any], names: str | Iterable[str], **options: Any
) -> tuple[Tensor, Seen]:
    """(logits, what passed at the names). Options as in `record`; no gradient."""
    with torch.no_grad(), record(model, names, **options) as seen:
        logits = run(model, inputs)
    return logits, seen


def run_with_hooks(
    model: nn.Module,
    inputs: Batch | Mapping[str, Any],
    fwd_hooks: Iterable[tuple[str, Change]],
) -> Tensor:
    """Logits, while function(tensor, hook) may change what passes at each name."""
    with ExitStack() as stack:
        for name, change in fwd_hooks:
            stack.enter_context(hooks(model, {name: change}))
        return run(model, inputs)


@dataclass(frozen=True)
class Lens:
    """What the model would say at each layer, if the output head read the stream there.

    ids, probabilities  (L + 1, B, P, k)  the k likeliest tokens of each position; row 0 is before
                        the first layer, row L behind the last: the model's own prediction
    wanted              (L + 1, B, P)  probability of the tokens asked for; None without
    """

    ids: Tensor
    probabilities: Tensor
    wanted: Tensor | None


def logit_lens(
    model: Qwen2Audio,
    inputs: Batch,
    positions: Positions = None,
    *,
    top: int = 5,
    targets: Sequence[int] | None = None,
) -> Lens:
    """Read the residual stream of every layer through the last norm and the output head.

    positions   of text or of audio, Layout names them; None for all
    targets     a token for each position, whose probability is wanted at every layer
    nostalgebraist, "interpreting GPT: the logit lens", 2020; of audio: AudioLens, 2025.
    """
    trunk, head = model.language_model.model, model.language_model.lm_head
    depth = len(trunk.layers)
    at = _columns(_listed(positions), inputs.ids.shape[1], 0, inputs.ids.device)
    aim = None if targets is None else torch.tensor(list(targets))
    if aim is not None and len(aim) != len(at):
        raise InputError(f"{len(at)} positions, but {len(aim)} targets: give one for each")
    rows: list[tuple[Tensor, Tensor, Tensor | None]] = [(at, at, None)] * (depth + 1)

    def read(x: Tensor, layer: int) -> None:
        ids, best, wanted = [], [], []
        for first in range(0, len(at), 32):  # a vocabulary of 156,032 is read 32 positions a time
            # `forward` itself, so that no other hook takes this for a step of the model.
            hidden = trunk.norm.forward(x.index_select(1, at[first : first + 32].to(x.device)))
            chances = head.forward(hidden).float().softmax(-1)
            strongest = chances.topk(top)
            ids.append(strongest.indices.cpu())
            best.append(strongest.values.cpu())
            if aim is not None:
                asked = aim[first : first + 32].to(x.device).expand(len(x), -1)[..., None]
                wanted.append(chances.gather(-1, asked)[..., 0].cpu())
        of_targets = torch.cat(wanted, 1) if wanted else None
        rows[layer] = (torch.cat(ids, 1), torch.cat(best, 1), of_targets)

    def before(x: Tensor, point: Point) -> None:
        read(x, point.layer() or 0)

    def behind(x: Tensor, point: Point) -> None:
        read(x, depth)

    reads = {"blocks.*.hook_resid_pre": before, f"blocks.{depth - 1}.hook_resid_post": behind}
    with torch.no_grad(), hooks(model, reads):
        run(model, inputs)
    asked = [row[2] for row in rows if row[2] is not None]
    return Lens(
        torch.stack([row[0] for row in rows]),
        torch.stack([row[1] for row in rows]),
        torch.stack(asked) if asked else None,
    )
