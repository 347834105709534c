"""Names for the places in a model where a tensor passes, and how it is watched there.

A name is a module's path (its output), path:in (what comes into it) or path:pattern (the weights of
an attention module); or one of the names of TransformerLens, which `TABLE` translates. In every
name * stands for any part and 2-5 for the numbers 2 to 5. Paths are those of the published
checkpoint, so the same names work on the transformers model too, attention weights apart.

Names of TransformerLens (l is a layer; with "audio." in front those of the audio tower):

    hook_embed                          text embeddings, before the clips are spliced in
    blocks.l.hook_resid_pre, _mid, _post    the residual stream before, within and behind a layer
    blocks.l.ln1, .ln2.hook_normalized  behind a layer's norms, their weights applied
    blocks.l.attn.hook_q, hook_k, hook_v    (B, T, heads, C), before the rotation
    blocks.l.attn.hook_pattern          attention weights (B, H, T, S)
    blocks.l.attn.hook_z                (B, T, H, C), what the heads hand to the output projection
    blocks.l.hook_attn_out, hook_mlp_out    what attention and MLP add to the stream
    blocks.l.mlp.hook_pre, hook_pre_linear, hook_post    gate, up, and what the last layer of the
                                        MLP reads (audio: hook_pre and hook_post alone)
    ln_final.hook_normalized            what the output head reads
    audio.hook_conv1, audio.hook_conv2  (n, Da, frames), before the gelu
    audio.ln_final.hook_normalized      the tower's output, one row for each audio token
    hook_audio_embeds                   the projector's output, in the text's width
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qwen2audio_core import ops
from qwen2audio_core.backends import is_attention, path_pattern
from qwen2audio_core.errors import InputError
from qwen2audio_core.weights import published_name

Change = Callable[[Tensor, "Point"], Tensor | None]

_TEXT, _AUDIO = "language_model.model.layers.{l}.", "audio_tower.layers.{l}."
# name -> (path and side, whether the last axis is shown as heads)
TABLE: dict[str, tuple[str, bool]] = {
    "hook_embed": ("language_model.model.embed_tokens", False),
    "blocks.{l}.hook_resid_pre": (_TEXT + ":in", False),
    "blocks.{l}.ln1.hook_normalized": (_TEXT + "input_layernorm", False),
    "blocks.{l}.attn.hook_q": (_TEXT + "self_attn.q_proj", True),
    "blocks.{l}.attn.hook_k": (_TEXT + "self_attn.k_proj", True),
    "blocks.{l}.attn.hook_v": (_TEXT + "self_attn.v_proj", True),
    "blocks.{l}.attn.hook_pattern": (_TEXT + "self_attn:pattern", False),
    "blocks.{l}.attn.hook_z": (_TEXT + "self_attn.o_proj:in", True),
    "blocks.{l}.hook_attn_out": (_TEXT + "self_attn", False),
    "blocks.{l}.hook_resid_mid": (_TEXT + "post_attention_layernorm:in", False),
    "blocks.{l}.ln2.hook_normalized": (_TEXT + "post_attention_layernorm", False),
    "blocks.{l}.mlp.hook_pre": (_TEXT + "mlp.gate_proj", False),
    "blocks.{l}.mlp.hook_pre_linear": (_TEXT + "mlp.up_proj", False),
    "blocks.{l}.mlp.hook_post": (_TEXT + "mlp.down_proj:in", False),
    "blocks.{l}.hook_mlp_out": (_TEXT + "mlp", False),
    "blocks.{l}.hook_resid_post": (_TEXT, False),
    "ln_final.hook_normalized": ("language_model.model.norm", False),
    "hook_audio_embeds": ("multi_modal_projector", False),
    "audio.hook_conv1": ("audio_tower.conv1", False),
    "audio.hook_conv2": ("audio_tower.conv2", False),
    "audio.blocks.{l}.hook_resid_pre": (_AUDIO + ":in", False),
    "audio.blocks.{l}.ln1.hook_normalized": (_AUDIO + "self_attn_layer_norm", False),
    "audio.blocks.{l}.attn.hook_q": (_AUDIO + "self_attn.q_proj", True),
    "audio.blocks.{l}.attn.hook_k": (_AUDIO + "self_attn.k_proj", True),
    "audio.blocks.{l}.attn.hook_v": (_AUDIO + "self_attn.v_proj", True),
    "audio.blocks.{l}.attn.hook_pattern": (_AUDIO + "self_attn:pattern", False),
    "audio.blocks.{l}.attn.hook_z": (_AUDIO + "self_attn.out_proj:in", True),
    "audio.blocks.{l}.hook_attn_out": (_AUDIO + "self_attn", False),
    "audio.blocks.{l}.hook_resid_mid": (_AUDIO + "final_layer_norm:in", False),
    "audio.blocks.{l}.ln2.hook_normalized": (_AUDIO + "final_layer_norm", False),
    "audio.blocks.{l}.mlp.hook_pre": (_AUDIO + "fc1", False),
    "audio.blocks.{l}.mlp.hook_post": (_AUDIO + "fc2:in", False),
    "audio.blocks.{l}.hook_mlp_out": (_AUDIO + "fc2", False),
    "audio.blocks.{l}.hook_resid_post": (_AUDIO, False),
    "audio.ln_final.hook_normalized": ("audio_tower.layer_norm", False),
}


@dataclass(frozen=True)
class Point:
    """A place in a model where a tensor passes."""

    name: str  # as it was asked for
    module: nn.Module
    side: str = "out"  # or "in", or "pattern"
    head_dim: int = 0  # shown as (..., heads, head_dim); 0 as it is

    def layer(self) -> int | None:
        """The number of the layer it lies in."""
        number = re.search(r"(?:^|\.)(?:layers|blocks)\.(\d+)(?:[.:]|$)", self.name)
        return int(number[1]) if number else None

    @property
    def axis(self) -> int:
        """Along which the positions of the sequence lie."""
        return 2 if self.side == "pattern" or isinstance(self.module, nn.Conv1d) else 1


def points(model: nn.Module, patterns: str | Iterable[str]) -> list[Point]:
    """Every point that the patterns name, each once.

    errors   InputError for a pattern that names nothing, and for a compiled model
    """
    for module in model.modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None):
            raise InputError("the model is compiled and cannot be looked into: probe it before")
    modules, known = _modules(model), _known(model)
    found: dict[str, Point] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        path, _, side = pattern.partition(":")
        if side not in ("", "in", "pattern"):
            raise InputError(f"{pattern!r}: a name ends in :in, :pattern or neither")
        wanted, any_yet = path_pattern(path, below=False), False
        for name, (own, alias, heads) in known.items():
            if not wanted.fullmatch(name) or (side and alias):
                continue
            module, place = modules[own], side or alias or "out"
            if place == "pattern" and "attention_op" not in vars(module):
                if not own.endswith("self_attn"):
                    continue
                raise InputError(
                    f"{name} has no slot for attention, so its weights cannot be seen"
                    " (transformers shows them with attn_implementation='eager' and"
                    " output_attentions=True)"
                )
            full = f"{name}:{side}" if side else name
            found[full] = Point(full, module, place, _head_dim(modules, own) if heads else 0)
            any_yet = True
        if not any_yet:
            raise InputError(f"{pattern!r} names nothing in this model, probe.names() lists all")
    return list(found.values())


def names(model: nn.Module) -> list[str]:
    """Every name that can be asked for: modules in their order, then those of TransformerLens."""
    return list(_known(model))


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by the paths that the published checkpoint would give them."""
    # A dot behind the path makes it look like a tensor's name, which is what is mapped.
    return {
        published_name(path + ".").removesuffix("."): module
        for path, module in model.named_modules()
        if path
    }


def _known(model: nn.Module) -> dict[str, tuple[str, str, bool]]:
    """name -> (path of the module; side, "" for the module's own name; whether shown in heads)"""
    modules = _modules(model)
    known = {path: (path, "", False) for path in modules}
    for name, (place, heads) in TABLE.items():
        path, _, side = place.partition(":")
        stack, many, _ = path.partition(".{l}")
        layers = modules.get(stack)
        for number in range(len(layers) if many and isinstance(layers, nn.ModuleList) else 1):
            own = path.format(l=number).removesuffix(".")
            if own in modules:
                known[name.format(l=number)] = (own, side or "out", heads)
    return known


def _head_dim(modules: Mapping[str, nn.Module], path: str) -> int:
    return int(vars(modules[path.rpartition(".")[0]])["head_dim"])


@contextmanager
def watched(point: Point, tell: Change) -> Iterator[None]:
    """Call tell(tensor, point) for everything that passes; what it returns takes its place."""

    def change(x: Tensor) -> Tensor:
        shown = x.unflatten(-1, (-1, point.head_dim)) if point.head_dim else x
        new = tell(shown, point)
        return x if new is None else new.reshape(x.shape).to(x.dtype)

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output)
        if isinstance(output, tuple):  # modules of transformers hand on more than one thing
            return change(output[0]), *output[1:]
        first = output.to_tuple()[0]
        if change(first) is not first:
            raise InputError(f"{point.name} returns an object, nothing can be put in its place")
        return None

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        key = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
        return args, kwargs | {key: change(kwargs[key])}

    module = point.module
    if point.side == "pattern":
        held: Any = module.attention_op
        slot = WatchedAttention(held, change)
        module.attention_op = slot  # type: ignore[assignment]
        handles = [
            module.register_forward_pre_hook(slot.enter),
            module.register_forward_hook(slot.leave, always_call=True),
        ]
        try:
            yield
        finally:
            module.attention_op = held
            for one in handles:
                one.remove()
        return
    handle = (
        module.register_forward_hook(after)
        if point.side == "out"
        else module.register_forward_pre_hook(before, with_kwargs=True)
    )
    try:
        yield
    finally:
        handle.remove()


class WatchedAttention:
    """ops.attention whose weights pass through functions on their way.

    The engine borrows a layer's slot for part of its work without running the layer. It gets what
    stood in the slot before, so that nobody takes that part for the whole.
    """

    def __init__(self, held: Any, change: Callable[[Tensor], Tensor]):
        watched = isinstance(held, WatchedAttention)
        self.changes: list[Callable[[Tensor], Tensor]] = [
            *(held.changes if watched else ()),
            change,
        ]
        self.plain: Callable[..., Tensor] = held.plain if watched else held
        if not is_attention(self.plain):
            raise InputError(
                "the weights of an attention function of your own cannot be seen: those of"
                " ops.attention would be shown, and run, in its place"
            )
        self.running = False

    def enter(self, module: nn.Module, args: Any) -> None:
        self.running = True

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running = False

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = False,
        key_start: Tensor | None = None,
        key_end: Tensor | None = None,
    ) -> Tensor:
        if not self.running:
            return self.plain(q, k, v, causal=causal, key_start=key_start, key_end=key_end)
        weights = ops.attention_weights(q, k, causal, key_start, key_end)
        for change in self.changes:
            weights = change(weights)
        return ops.attend(weights, v)
