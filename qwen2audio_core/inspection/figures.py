"""The pictures of an inspection as files, PNG and SVG, drawn with matplotlib.

Each is one idea, with units at its axes, in colours that can be told apart without colour vision.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen2audio_core import install
from qwen2audio_core.errors import InputError
from qwen2audio_core.frontend import SAMPLE_RATE, SECONDS_PER_TOKEN
from qwen2audio_core.inspection.collect import KINDS, Inspection

WIDTH = 8.0  # inches
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#57606a"
UNITS = {
    "occlusion": "fall of log-odds\nwithout 200 ms",
    "gradient": "gradient x input,\nlog-odds",
    "rollout": "attention rollout,\nshare",
}


def save(seen: Inspection, folder: str | Path) -> list[Path]:
    """Write folder/NAME.png and NAME.svg for every picture; returns the files.

    errors   InputError without matplotlib, or where the folder cannot be written to
    """
    try:
        import matplotlib
        from matplotlib import font_manager
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            f"figures are drawn with matplotlib, which is not installed: {install.extra('plot')}"
        ) from error
    folder = Path(folder)
    known = {font.name for font in font_manager.fontManager.ttflist}
    wide = [name for name in known if "CJK" in name or "WenQuanYi" in name][:2]
    style: Any = {
        "font.family": ["DejaVu Sans", *sorted(wide)],
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "svg.hashsalt": "qwen2audio",
    }
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(style), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            for name, draw in PICTURES.items():
                figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
                draw(seen, figure)
                for kind in ("png", "svg"):
                    written.append(folder / f"{name}.{kind}")
                    extra: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {}
                    figure.savefig(written[-1], dpi=150, **extra)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot write figures there ({error.strerror}), choose another folder"
        ) from error
    return written


def sound(seen: Inspection, figure: Any) -> None:
    """Waveform above, log-mel below."""
    figure.set_size_inches(WIDTH, 4.5)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    samples = seen.waveform.numpy()
    every = max(1, len(samples) // 20_000)
    top.plot(
        [i / SAMPLE_RATE for i in range(0, len(samples), every)],
        samples[::every],
        color=BLUE,
        linewidth=0.5,
    )
    top.set_ylabel("amplitude")
    top.set_title("The sound")
    image = _mel(seen, below, "inferno")
    bar = figure.colorbar(image, ax=below, pad=0.01)
    bar.set_label("power in dB")
    _seconds(seen, below)


def tower_norms(seen: Inspection, figure: Any) -> None:
    """How large each frame's vector is behind each layer."""
    axes = figure.subplots()
    image = axes.imshow(
        seen.norms.numpy(),
        aspect="auto",
        origin="lower",
        cmap="Blues",
        interpolation="nearest",
        vmin=0,
        extent=(0, seen.duration, -0.5, len(seen.norms) - 0.5),
    )
    figure.colorbar(image, ax=axes, pad=0.01).set_label("root mean square")
    axes.set_ylabel("after layer")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_title("Audio tower: size of each frame's vector")
    _seconds(seen, axes)


def tower_similarity(seen: Inspection, figure: Any) -> None:
    """Which moments of the clip are alike, before the first layer and behind the last."""
    figure.set_size_inches(WIDTH, 4.2)
    panels = figure.subplots(1, 2, sharey=True)
    last = len(seen.similarity) - 1
    for axes, layer in zip(panels, (0, last), strict=True):
        image = axes.imshow(
            seen.similarity[layer].numpy(),
            origin="lower",
            cmap="PuOr_r",
            vmin=-1,
            vmax=1,
            extent=(0, seen.duration, 0, seen.duration),
        )
        axes.set_title("before layer 1" if layer == 0 else f"after layer {layer}")
        axes.set_xlabel("time in seconds")
    panels[0].set_ylabel("time in seconds")
    figure.colorbar(image, ax=panels, pad=0.01, shrink=0.8).set_label("cosine, less the mean frame")


def answer(seen: Inspection, figure: Any) -> None:
    """How sure the model was of each token."""
    figure.set_size_inches(WIDTH, max(1.8, 0.26 * seen.shown + 1.0))
    axes = figure.subplots()
    rows = range(seen.shown)
    axes.barh(rows, seen.probabilities.numpy(), color=BLUE)
    for row, p in zip(rows, seen.probabilities.tolist(), strict=True):
        axes.text(p + 0.01, row, f"{100 * p:.0f} %", va="center", fontsize=9, color=GREY)
    axes.set_yticks(rows, _tokens(seen))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1)
    axes.set_xlabel("probability")
    axes.set_title("The answer, token by token")


def attributions(seen: Inspection, figure: Any) -> None:
    """Where the least certain of the words listened, by the three methods."""
    token = focus(seen)
    figure.set_size_inches(WIDTH, 6.0)
    panels = figure.subplots(len(UNITS), 1, sharex=True)
    for axes, (name, unit) in zip(panels, UNITS.items(), strict=True):
        _mel(seen, axes, "Greys", alpha=0.35)
        axes.set_yticks([])
        axes.set_ylabel("")
        curve = axes.twinx()
        row = seen.attributions[name].weights[token].numpy()
        times = _token_seconds(seen)
        curve.fill_between(times, row, step="post", color=ORANGE, alpha=0.35)
        curve.step(times, row, where="post", color=ORANGE)
        curve.axhline(0, color=GREY, linewidth=0.5)
        curve.yaxis.set_label_position("left")
        curve.yaxis.tick_left()
        curve.set_ylabel(unit)
        peak = seen.attributions[name].peak(token)
        curve.axvline(peak, color="black", linewidth=1, linestyle=":")
        curve.set_title(f"peak at {peak:.2f} s", fontsize=9, color=GREY, loc="right")
    panels[0].set_title(f"Where it listened for “{_tokens(seen)[token]}”")
    _seconds(seen, panels[-1])


def attention_by_head(seen: Inspection, figure: Any) -> None:
    """How much of each head's attention goes to the clip, over the answer."""
    share = seen.attention_by_kind[..., KINDS.index("audio")].mean(-1)  # (L, H)
    figure.set_size_inches(WIDTH, max(2.0, min(6.0, 0.3 * len(share) + 1.2)))
    axes = figure.subplots()
    layers, heads = share.shape
    image = axes.imshow(
        100 * share.numpy(),
        aspect="auto",
        origin="lower",
        cmap="Blues",
        vmin=0,
        vmax=100,
        extent=(0.5, heads + 0.5, 0.5, layers + 0.5),
    )
    figure.colorbar(image, ax=axes, pad=0.01).set_label("% of its attention")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_title("What each head takes from the clip, mean over the answer")


def attention_over_time(seen: Inspection, figure: Any) -> None:
    """Each token of the answer over the clip, by the head that listens most."""
    share = seen.attention_by_kind[..., KINDS.index("audio")].mean(-1)
    layer, head = divmod(int(share.argmax()), share.shape[1])
    figure.set_size_inches(WIDTH, max(2.2, 0.22 * seen.shown + 1.2))
    axes = figure.subplots()
    times = [*_token_seconds(seen), seen.duration]
    image = axes.pcolormesh(
        times,
        [k - 0.5 for k in range(seen.shown + 1)],
        seen.attention[layer, head].float().numpy(),
        cmap="Blues",
        vmin=0,
        rasterized=True,
    )
    figure.colorbar(image, ax=axes, pad=0.01).set_label("attention weight")
    axes.set_yticks(range(seen.shown), _tokens(seen))
    axes.invert_yaxis()
    axes.set_title(f"What each token was written from: layer {layer + 1}, head {head + 1}")
    _seconds(seen, axes)


def logit_lens(seen: Inspection, figure: Any) -> None:
    """What the model would say at each layer."""
    columns, layers = min(seen.shown, 16), len(seen.lens)
    figure.set_size_inches(max(WIDTH, 0.75 * columns), max(2.2, 0.32 * layers + 1.2))
    axes = figure.subplots()
    chances = [[cell[0][1] for cell in row[:columns]] for row in seen.lens]
    image = axes.imshow(chances, aspect="auto", origin="lower", cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, pad=0.01).set_label("probability")
    for layer, row in enumerate(seen.lens):
        for column, cell in enumerate(row[:columns]):
            colour = "white" if cell[0][1] > 0.55 else "black"
            axes.text(
                column, layer, _plain(cell[0][0], 8), ha="center", va="center", color=colour,
                fontsize=8,
            )  # fmt: skip
    axes.set_xticks(range(columns), _tokens(seen)[:columns], rotation=45, ha="right")
    axes.set_yticks(range(layers))
    axes.set_xlabel("token that was written")
    axes.set_ylabel("after layer")
    axes.set_title("Logit lens: the likeliest token at each layer")


def time_and_memory(seen: Inspection, figure: Any) -> None:
    """How long each stage took."""
    figure.set_size_inches(WIDTH, 0.3 * len(seen.stages) + 1.2)
    axes = figure.subplots()
    rows = range(len(seen.stages))
    axes.barh(rows, [1000 * stage.seconds for stage in seen.stages], color=BLUE)
    for row, stage in zip(rows, seen.stages, strict=True):
        memory = f", {stage.bytes / 1e6:.0f} MB" if stage.bytes else ""
        text = f" {1000 * stage.seconds:.1f} ms{memory}"
        axes.text(1000 * stage.seconds, row, text, va="center", fontsize=9, color=GREY)
    axes.set_yticks(rows, [stage.name for stage in seen.stages])
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel("time in milliseconds")
    axes.set_title(f"Time of each stage, {seen.device}")


PICTURES: dict[str, Callable[[Inspection, Any], None]] = {
    "sound": sound,
    "tower_norms": tower_norms,
    "tower_similarity": tower_similarity,
    "answer": answer,
    "attributions": attributions,
    "attention_by_head": attention_by_head,
    "attention_over_time": attention_over_time,
    "logit_lens": logit_lens,
    "time_and_memory": time_and_memory,
}


def focus(seen: Inspection) -> int:
    """The token whose attributions are drawn: the word on which occlusion has most to say."""
    falls = seen.attributions["occlusion"].weights.amax(1).tolist()
    words = [k for k, text in enumerate(seen.tokens) if any(map(str.isalnum, text))
             and not text.startswith("<|")]  # fmt: skip
    return max(words or range(seen.shown), key=lambda k: falls[k])


def _mel(seen: Inspection, axes: Any, colours: str, alpha: float = 1.0) -> Any:
    decibel = 40 * (seen.mel - seen.mel.max())
    image = axes.imshow(
        decibel.numpy(),
        aspect="auto",
        origin="lower",
        cmap=colours,
        vmin=-80,
        vmax=0,
        alpha=alpha,
        extent=(0, seen.duration, 0, 1),
    )
    marks = (0, 500, 1000, 2000, 4000, 8000)
    top = mel_of(8000)
    axes.set_yticks([mel_of(hertz) / top for hertz in marks], [str(hertz) for hertz in marks])
    axes.set_ylabel("pitch in Hz")
    return image


def mel_of(hertz: float) -> float:
    """Slaney's mel scale, as in frontend.mel_filters."""
    import math

    if hertz < 1000:
        return hertz * 3 / 200
    return 15 + math.log(hertz / 1000) * 27 / math.log(6.4)


def _seconds(seen: Inspection, axes: Any) -> None:
    axes.set_xlabel("time in seconds")
    axes.set_xlim(0, seen.duration)
    for bound in seen.bounds[1:-1]:
        axes.axvline(bound, color=GREY, linestyle="--", linewidth=0.8)


def _token_seconds(seen: Inspection) -> list[float]:
    return [
        begin + i * SECONDS_PER_TOKEN
        for begin, many in zip(seen.bounds, seen.audio_tokens, strict=False)
        for i in range(many)
    ]


def _tokens(seen: Inspection) -> list[str]:
    return [_plain(text) for text in seen.tokens]


def _plain(text: str, most: int = 14) -> str:
    text = text.replace("\n", "⏎").strip() or "␣"
    text = text if len(text) <= most else text[: most - 1] + "…"
    return text.replace("$", r"\$")  # which would begin a formula
