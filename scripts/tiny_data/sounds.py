"""Sounds, melodies and noises by formula, for the small model's data.

    SOUNDS["siren"].caption                  "A siren is wailing."
    sound("siren", rng, 2.0)                 a siren unlike the last one, (32000,) at 16 kHz
    melody(rng, "rising", "fast", "flute")   notes of a scale
    noise(rng, "pink", 2.0)                  unit RMS
    draw(random.Random(0)), caption(clip)    a clip's description (render.py), and what it holds

Every function draws its pitch, speed, count and colour from `rng`, within what people would still
call by that name. Levels are arbitrary, render.py sets them.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Generator = np.random.Generator
Array = np.ndarray

RATE = 16_000
NOISES = ("white", "pink", "brown", "hum")
DIRECTIONS = ("rising", "falling")
TEMPOS = ("fast", "slow")


# Building blocks


def clock(seconds: float) -> Array:
    """Time of each sample, in seconds."""
    return np.arange(max(1, round(seconds * RATE))) / RATE


def phase(hertz: Array) -> Array:
    """The phase, in radians, of a tone whose frequency is given at each sample."""
    return 2 * np.pi * np.cumsum(hertz) / RATE


def harmonics(angle: Array, levels: Sequence[float], hertz: float) -> Array:
    """A tone and its multiples: sum of levels[k] sin((k + 1) angle), those below 7.8 kHz.

    `hertz` is the highest frequency that the tone reaches. sin((k + 1) a) comes from the two
    before it, 2 cos(a) sin(k a) - sin((k - 1) a), which is four times as fast as a sine each.
    """
    before, sine = np.zeros_like(angle), np.sin(angle)
    double = 2 * np.cos(angle)
    waves = np.zeros_like(angle)
    for k, level in enumerate(levels):
        if (k + 1) * hertz > 7800:
            break
        waves += level * sine
        before, sine = sine, double * sine - before
    return waves


def ring(time: Array, hertz: Sequence[float], fades: Sequence[float], levels: Sequence[float]):
    """Tones struck together at time 0, each fading at its own rate (1/s)."""
    waves = np.zeros(len(time))
    for tone, fade, level in zip(hertz, fades, levels, strict=True):
        if tone < 7800:
            heard = time[: round(7 / fade * RATE) + 1]  # by then it is 60 dB down
            waves[: len(heard)] += level * np.exp(-fade * heard) * np.sin(2 * np.pi * tone * heard)
    return waves


def band(rng: Generator, length: int, low: float, high: float, slope: float = 0.0) -> Array:
    """Noise between two frequencies, falling off softly (12 dB an octave) outside; unit RMS.

    slope  dB per octave within the band
    """
    size = fast_size(length)
    hertz = np.arange(size // 2 + 1, dtype=np.float32) * (RATE / size)
    hertz[0] = 1.0
    gain = 1 / np.sqrt((1 + (low / hertz) ** 4) * (1 + (hertz / high) ** 4))
    if slope:
        gain *= (hertz / low) ** (slope / 6.02)
    waves = np.fft.irfft(spectrum(rng, size) * gain, size)[:length]
    return waves / max(np.sqrt(np.square(waves).mean()), 1e-9)


def spectrum(rng: Generator, size: int) -> Array:
    """The spectrum of white noise, for irfft to `size` samples."""
    numbers = rng.standard_normal(2 * (size // 2 + 1), dtype=np.float32)
    return numbers.view(np.complex64)


def fast_size(length: int) -> int:
    """The smallest 2^a, 3 * 2^a or 5 * 2^a that is at least `length`: an FFT is fast at these."""
    return min(factor << max(0, (-(-length // factor) - 1).bit_length()) for factor in (1, 3, 5))


def wander(rng: Generator, length: int, hertz: float) -> Array:
    """A smooth random curve that changes about `hertz` times a second; mean 0, RMS about 1."""
    count = int(length / RATE * hertz * 2) + 4
    knots = rng.standard_normal(count)
    place = np.linspace(0.5, count - 2.5, length)
    i = place.astype(int)
    blend = (1 - np.cos(np.pi * (place - i))) / 2
    return knots[i] * (1 - blend) + knots[i + 1] * blend


def swell(length: int, rise: float, fall: float) -> Array:
    """A window that rises and falls by half cosines of the given seconds."""
    window = np.ones(length)
    for edge, seconds in ((slice(None), rise), (slice(None, None, -1), fall)):
        count = min(round(seconds * RATE), length // 2)
        if count:
            window[edge][:count] *= (1 - np.cos(np.pi * np.arange(count) / count)) / 2
    return window


def add(waves: Array, start: float, piece: Array, level: float = 1.0) -> None:
    """Add a piece from `start` seconds on, in place, as far as it fits."""
    first = round(start * RATE)
    piece = piece[: max(0, len(waves) - first)]
    waves[first : first + len(piece)] += level * piece


def beats(rng: Generator, seconds: float, period: float, jitter: float = 0.0) -> list[float]:
    """Times about `period` apart, at least one, the last well before the end."""
    times, now = [], rng.uniform(0.0, 0.15 * min(period, seconds))
    while not times or now < seconds - 0.12:
        times.append(now)
        now += period * max(0.3, 1 + jitter * rng.standard_normal())
    return times


def between(rng: Generator, low: float, high: float) -> float:
    """A number drawn evenly on a logarithmic scale, as pitch and speed are heard."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def formants(hertz: Array, peaks: Sequence[tuple[float, float]]) -> Array:
    """How a throat weighs frequencies: a sum of resonances (centre, width)."""
    return np.sum([1 / (1 + ((hertz - centre) / width) ** 2) for centre, width in peaks], axis=0)


# Sounds: (rng, seconds) -> waveform


def siren(rng: Generator, seconds: float) -> Array:
    """Up and down in a wail, or two tones in turn."""
    time = clock(seconds)
    low, ratio = between(rng, 420, 800), between(rng, 1.3, 2.1)
    start = rng.uniform()
    if rng.random() < 0.5:
        turn = (time * between(rng, 0.35, 1.6) + start) % 1
        hertz = low * ratio ** (1 - np.abs(2 * turn - 1))
    else:
        ratio = between(rng, 1.25, 1.5)
        hertz = np.where((time * between(rng, 0.7, 1.8) + start) % 1 < 0.5, low, low * ratio)
    edge = rng.uniform(0.4, 0.75)
    return harmonics(phase(hertz), edge ** np.arange(6), low * ratio)


def bell(rng: Generator, seconds: float) -> Array:
    """A church or hand bell, struck once or several times; the higher a partial, the sooner
    gone."""
    ratios = np.array((0.5, 1.0, 1.183, 1.506, 2.0, 2.514, 2.662, 3.011, 4.166))
    hertz = between(rng, 330, 1300) * ratios * (1 + 0.01 * rng.standard_normal(9))
    levels = rng.uniform(0.4, 1.0, 9) / np.sqrt(ratios)
    fade = between(rng, 0.8, 2.0)
    waves = np.zeros(len(clock(seconds)))
    stroke = ring(clock(seconds), hertz, fade * (0.6 + ratios), levels)
    period = between(rng, 0.55, 1.6) if rng.random() < 0.7 else seconds + 1
    for start in beats(rng, seconds, period, 0.03):
        add(waves, start, stroke, rng.uniform(0.7, 1.0))
    return waves


def applause(rng: Generator, seconds: float) -> Array:
    """Many pairs of hands, each with its own hollow and its own pace."""
    waves = np.zeros(len(clock(seconds)))
    time = clock(0.03)
    for _ in range(int(between(rng, 5, 30))):
        centre = between(rng, 700, 1900)
        clap = np.exp(-time / between(rng, 0.003, 0.006)) * band(
            rng, len(time), centre / 1.4, centre * 1.5
        )
        level = between(rng, 0.15, 1.0)
        for start in beats(rng, seconds, between(rng, 0.18, 0.32), 0.12):
            add(waves, start + 0.1 * rng.random(), clap, level * rng.uniform(0.6, 1))
    return waves


def rain(rng: Generator, seconds: float) -> Array:
    """A steady bright hiss, and drops close by."""
    length = len(clock(seconds))
    waves = band(rng, length, between(rng, 1500, 3000), 7500) * (1 + 0.08 * wander(rng, length, 2))
    time = clock(0.006)
    for _ in range(int(between(rng, 60, 200) * seconds)):
        drop = np.exp(-time / 0.001) * np.sin(2 * np.pi * between(rng, 1800, 5500) * time)
        add(waves, rng.uniform(0, seconds), drop, rng.exponential(2.0))
    return waves


def heartbeat(rng: Generator, seconds: float) -> Array:
    """Two dull thumps, a pause, and again."""
    waves = np.zeros(len(clock(seconds)))
    hertz = between(rng, 45, 75)
    time = clock(0.16)
    period = between(rng, 0.55, 1.1)
    gap = period * rng.uniform(0.28, 0.36)
    fade = between(rng, 0.025, 0.045)
    for start in beats(rng, seconds, period, 0.03):
        for delay, pitch, level in ((0.0, hertz, 1.0), (gap, hertz * 1.25, rng.uniform(0.5, 0.9))):
            thump = np.sin(phase(pitch * (1 + 0.5 * np.exp(-time / 0.02))))
            shape = np.minimum(time / 0.008, 1) * np.exp(-time / fade)
            add(waves, start + delay, thump * shape, level)
    return waves + 0.002 * band(rng, len(waves), 40, 200)


def whistle(rng: Generator, seconds: float) -> Array:
    """Lips: a pure tone that glides from note to note, with a little breath."""
    time = clock(seconds)
    count = max(2, round(seconds * between(rng, 1.2, 3.5)))
    notes = between(rng, 900, 1700) * 2 ** (rng.integers(-4, 8, count) / 12)
    place = np.clip(time / seconds * count, 0, count - 1e-6)
    i = place.astype(int)
    glide = np.clip((place - i) / rng.uniform(0.1, 0.4), 0, 1)
    hertz = notes[np.maximum(i - 1, 0)] * (notes[i] / notes[np.maximum(i - 1, 0)]) ** glide
    hertz *= 1 + rng.uniform(0.002, 0.015) * np.sin(2 * np.pi * rng.uniform(4.5, 7) * time)
    tone = harmonics(phase(hertz), (1, 0.03, 0.01), hertz.max())
    loud = 1 - 0.6 * np.exp(-(((place - i) / 0.12) ** 2))
    breath = rng.uniform(0.01, 0.05) * band(rng, len(time), 1500, 5000)
    return (tone * loud + breath) * swell(len(time), 0.05, 0.1)


def engine(rng: Generator, seconds: float) -> Array:
    """Explosions of a few cylinders, near enough to one another to be a low roar."""
    time = clock(seconds)
    hertz = between(rng, 28, 80) * (1 + 0.03 * wander(rng, len(time), 1.5))
    if rng.random() < 0.4:  # accelerates, or slows down
        hertz *= np.linspace(1, between(rng, 0.6, 1.8), len(time))
    levels = rng.uniform(0.3, 1, 40) * 0.93 ** np.arange(40)
    angle = phase(hertz)
    waves = harmonics(angle + 0.3 * np.sin(angle / 4), levels, hertz.max())
    roar = band(rng, len(time), 80, between(rng, 500, 1500), -4)
    return waves + rng.uniform(0.3, 1.2) * roar * (1.2 + np.sin(angle)) / 2


def glass(rng: Generator, seconds: float) -> Array:
    """A crash, and splinters that ring high and briefly."""
    waves = np.zeros(len(clock(seconds)))
    start = rng.uniform(0.02, 0.25)
    time = clock(0.25)
    crash = band(rng, len(time), 2000, 7500) * np.exp(-time / between(rng, 0.015, 0.05))
    add(waves, start, crash, rng.uniform(0.5, 1.0))
    spread = between(rng, 0.12, 0.4)
    for _ in range(int(between(rng, 25, 80))):
        hertz = [between(rng, 2000, 7500) for _ in range(3)]
        fades = [between(rng, 15, 60) for _ in hertz]
        splinter = ring(clock(0.3), hertz, fades, (1, 0.7, 0.5))
        delay = rng.exponential(spread)
        add(waves, start + delay, splinter, rng.uniform(0.1, 0.6) * np.exp(-delay / 0.5))
    return waves


def knock(rng: Generator, seconds: float) -> Array:
    """Knuckles on a door: a few dry blows, two to five in a row."""
    waves = np.zeros(len(clock(seconds)))
    body, fade = between(rng, 140, 260), between(rng, 30, 60)
    ratios = np.array((1.0, 2.3, 3.9, 6.1)) * (1 + 0.05 * rng.standard_normal(4))
    levels = (1, rng.uniform(0.4, 0.8), rng.uniform(0.2, 0.5), 0.2)
    time = clock(0.2)
    period = between(rng, 0.16, 0.34)
    count, now = int(rng.integers(2, 6)), rng.uniform(0.02, 0.2)
    while now < seconds - 0.12:
        for i in range(count):
            blow = ring(time, body * ratios, fade * (1 + ratios / 3), levels)
            blow[:160] += 0.4 * rng.standard_normal(160) * np.exp(-np.arange(160) / 30)
            add(waves, now + i * period * rng.uniform(0.94, 1.06), blow, rng.uniform(0.7, 1))
        now += count * period + rng.uniform(0.5, 0.9)
    return waves


def alarm(rng: Generator, seconds: float) -> Array:
    """An alarm clock: groups of short beeps of one high tone."""
    waves = np.zeros(len(clock(seconds)))
    hertz = between(rng, 1400, 3200)
    beep, count = between(rng, 0.05, 0.13), int(rng.integers(1, 5))
    gap, rest = beep * rng.uniform(0.6, 1.1), rng.uniform(0.2, 0.5)
    time = clock(beep)
    square = (1, 0, rng.uniform(0, 0.5), 0, rng.uniform(0, 0.3))
    tone = harmonics(2 * np.pi * hertz * time, square, hertz) * swell(len(time), 0.003, 0.003)
    now = rng.uniform(0, 0.15)
    while now < seconds:
        for i in range(count):
            if now + i * (beep + gap) + beep < seconds:
                add(waves, now + i * (beep + gap), tone)
        now += count * (beep + gap) + rest
    return waves


def ticking(rng: Generator, seconds: float) -> Array:
    """A clock: ticks as even as its gears, every second one a little lower."""
    waves = np.zeros(len(clock(seconds)))
    period = rng.choice((0.2, 0.25, 0.4, 0.5, 0.5)) * rng.uniform(0.97, 1.03)
    hertz, fade = between(rng, 2200, 4500), between(rng, 250, 600)
    ratio = rng.uniform(0.75, 0.95)
    time = clock(0.03)
    for i, start in enumerate(beats(rng, seconds, period)):
        tone = hertz * (ratio if i % 2 else 1)
        tick = ring(time, (tone, tone * 1.62, tone * 0.41), (fade,) * 3, (1, 0.5, 0.4))
        add(waves, start, tick, 0.8 if i % 2 else 1.0)
    return waves + 0.001 * band(rng, len(waves), 200, 4000)


def footsteps(rng: Generator, seconds: float) -> Array:
    """Heel, then sole, on gravel or boards; left and right differ a little."""
    waves = np.zeros(len(clock(seconds)))
    period = between(rng, 0.35, 0.7)
    thud, scrape = between(rng, 70, 120), between(rng, 900, 2500)
    crunch = rng.uniform(0.15, 0.5)
    for i, start in enumerate(beats(rng, seconds, period, 0.04)):
        time = clock(0.22)
        heel = ring(time, (thud, thud * 1.9), (35, 60), (1, 0.4))
        sole = band(rng, len(time), scrape * 0.5, scrape * 1.5)
        sole *= np.exp(-(((time - 0.09) / 0.035) ** 2)) + 0.7 * np.exp(-time / 0.01)
        add(waves, start, heel + crunch * sole, 1.0 if i % 2 else rng.uniform(0.7, 1.0))
    return waves


def bird(rng: Generator, seconds: float) -> Array:
    """Songs of quick chirps, each one bent upward, downward or over a hill."""
    waves = np.zeros(len(clock(seconds)))
    centre = between(rng, 2600, 4800)
    now = rng.uniform(0, 0.2)
    while now < seconds - 0.15:
        bend, length = rng.uniform(-0.35, 0.35), between(rng, 0.04, 0.14)
        hill, pitch = rng.uniform(-0.3, 0.3), centre * between(rng, 0.8, 1.3)
        for _ in range(int(rng.integers(2, 9))):
            along = np.linspace(0, 1, round(length * RATE))
            hertz = pitch * (1 + bend * (along - 0.5) + hill * np.sin(np.pi * along))
            chirp = np.sin(phase(np.minimum(hertz, 7500))) * np.sin(np.pi * along) ** 0.7
            add(waves, now, chirp, rng.uniform(0.7, 1))
            now += length * rng.uniform(1.2, 1.7)
        now += rng.uniform(0.1, 0.5)
    return waves


def dog(rng: Generator, seconds: float) -> Array:
    """Barks: a rough voice that jumps up and falls within a fifth of a second."""
    waves = np.zeros(len(clock(seconds)))
    size = between(rng, 0.75, 1.5)  # a big dog's throat is long
    period = between(rng, 0.32, 0.7)
    for start in beats(rng, seconds, period, 0.12):
        length = between(rng, 0.11, 0.2)
        along = np.linspace(0, 1, round(length * RATE))
        hertz = 330 * size * (0.65 + 0.6 * np.sin(np.pi * along**0.6)) * rng.uniform(0.93, 1.07)
        rough = 1 + 0.25 * band(rng, len(along), 20, 90)
        peak = hertz.max()
        multiples = peak * np.arange(1, 16)
        throat = formants(multiples, ((800 * size, 350), (1700 * size, 500), (3000 * size, 900)))
        bark = harmonics(phase(hertz * rough), throat, peak)
        bark += 0.15 * bark.std() * band(rng, len(along), 600 * size, 3500)
        add(waves, start, bark * swell(len(along), 0.012, length * 0.55), rng.uniform(0.7, 1))
    return waves


def telephone(rng: Generator, seconds: float) -> Array:
    """Two small bells, struck in turn some twenty times a second, with pauses."""
    time = clock(seconds)
    speed, hertz = between(rng, 14, 24), between(rng, 950, 1500)
    ratio = between(rng, 1.15, 1.35)
    turn = (time * speed) % 2
    bells = np.zeros(len(time))
    for tone, when in ((hertz, 0.0), (hertz * ratio, 1.0)):
        since = ((turn - when) % 2) / speed
        fade = np.exp(-since * between(rng, 8, 20))
        angle = 2 * np.pi * tone * time
        bells += fade * (np.sin(angle) + 0.5 * np.sin(2.76 * angle) + 0.2 * np.sin(5.4 * angle))
    on, off = between(rng, 0.5, 1.2), rng.uniform(0.2, 0.5)
    since = (time + rng.uniform(0, 0.2)) % (on + off)
    return bells * np.where(since < on, 1 - np.exp(-since / 0.03), np.exp(-(since - on) / 0.03))


def wind(rng: Generator, seconds: float) -> Array:
    """Noise that howls: a narrow band wanders up and down and swells with it."""
    length = len(clock(seconds))
    curve = wander(rng, length, between(rng, 0.5, 1.5))
    howl = between(rng, 280, 650) * 2 ** (0.35 * curve)
    slow = band(rng, length, 4, between(rng, 15, 45))
    slower = band(rng, length, 4, 30)
    angle = phase(howl)
    narrow = slow * np.sin(angle) + slower * np.cos(angle)
    gust = 2 ** (0.9 * curve)
    return gust * (narrow + rng.uniform(0.2, 0.5) * band(rng, length, 150, 900, -4))


def thunder(rng: Generator, seconds: float) -> Array:
    """A clap, then a rumble that rolls on and dies away."""
    time = clock(seconds)
    start = rng.uniform(0.0, 0.2)
    since = np.maximum(time - start, 0)
    fade = between(rng, 0.5, 1.2) * max(seconds, 1) / 2
    rolls = 2 ** (1.2 * wander(rng, len(time), between(rng, 2, 5)))
    rumble = band(rng, len(time), 30, between(rng, 90, 180), -3) * rolls
    crack = band(rng, len(time), 100, between(rng, 800, 2500), -4)
    shape = np.where(time >= start, np.minimum(since / between(rng, 0.01, 0.08), 1), 0)
    return shape * (
        rumble * np.exp(-since / fade)
        + rng.uniform(0.5, 2.0) * crack * np.exp(-since / between(rng, 0.06, 0.2))
    )


def dripping(rng: Generator, seconds: float) -> Array:
    """Drops into water: each a short tone that rises as its bubble shrinks."""
    waves = np.zeros(len(clock(seconds)))
    period, base = between(rng, 0.16, 0.6), between(rng, 600, 1300)
    for start in beats(rng, seconds, period, 0.25):
        time = clock(between(rng, 0.06, 0.12))
        hertz = base * between(rng, 0.8, 1.25) * (1 + between(rng, 5, 14) * time)
        drop = np.sin(phase(hertz)) * np.exp(-time / between(rng, 0.012, 0.03))
        add(waves, start, drop * swell(len(time), 0.002, 0.01), rng.uniform(0.5, 1))
    return waves


def horn(rng: Generator, seconds: float) -> Array:
    """A car's: two reeds, a third apart, blown once or a few times."""
    waves = np.zeros(len(clock(seconds)))
    hertz, ratio = between(rng, 300, 480), between(rng, 1.18, 1.34)
    levels = np.array((0.6, 0.9, 1, 0.8, 0.7, 0.5, 0.4, 0.3, 0.3, 0.2)) * rng.uniform(0.7, 1.3, 10)
    length = between(rng, 0.18, 0.9)
    for start in beats(rng, seconds, length + rng.uniform(0.08, 0.3), 0.03):
        time = clock(min(length, seconds - start))
        honk = sum(
            harmonics(2 * np.pi * tone * time, levels, tone) for tone in (hertz, hertz * ratio)
        )
        add(waves, start, honk * swell(len(time), 0.012, 0.03))
    return waves


def typing(rng: Generator, seconds: float) -> Array:
    """Keys: dull clicks in uneven bursts, down and up, now and then the space bar."""
    waves = np.zeros(len(clock(seconds)))
    speed, body = between(rng, 6, 12), between(rng, 900, 1700)
    now = rng.uniform(0, 0.1)
    time = clock(0.035)
    while now < seconds - 0.08:
        space = rng.random() < 0.15
        pitch = body * (0.45 if space else between(rng, 0.85, 1.2))
        click = ring(time, (pitch, pitch * 2.2), (180, 300), (1, 0.6))
        click += 0.8 * band(rng, len(time), 1500, 6000) * np.exp(-time / 0.003)
        add(waves, now, click, rng.uniform(0.6, 1.0))
        add(waves, now + rng.uniform(0.05, 0.08), click, rng.uniform(0.15, 0.35))
        now += rng.gamma(3, 1 / 3) / speed + 0.03 + (rng.uniform(0.15, 0.4) if space else 0)
    return waves


def cricket(rng: Generator, seconds: float) -> Array:
    """One high tone in trains of three to six pulses, evenly, all night."""
    waves = np.zeros(len(clock(seconds)))
    hertz, pulse = between(rng, 3900, 5600), between(rng, 0.012, 0.022)
    count, rest = int(rng.integers(3, 7)), rng.uniform(0.12, 0.4)
    time = clock(pulse)
    chirp = np.sin(2 * np.pi * hertz * time) * np.sin(np.pi * time / pulse) ** 0.8
    now = rng.uniform(0, 0.15)
    while now < seconds:
        for i in range(count):
            add(waves, now + i * pulse * 1.7, chirp, 0.6 + 0.4 * i / count)
        now += count * pulse * 1.7 + rest * rng.uniform(0.95, 1.05)
    return waves + 0.003 * band(rng, len(waves), 1000, 6000)


def cat(rng: Generator, seconds: float) -> Array:
    """Meows: a high voice whose mouth opens and closes."""
    waves = np.zeros(len(clock(seconds)))
    base, size = between(rng, 480, 780), between(rng, 0.9, 1.2)
    length = between(rng, 0.5, 0.9)
    for start in beats(rng, seconds, length + rng.uniform(0.25, 0.6), 0.05):
        along = np.linspace(0, 1, round(min(length, max(0.3, seconds - start)) * RATE))
        hertz = base * (0.85 + rng.uniform(0.2, 0.4) * np.sin(np.pi * along**0.8))
        hertz *= 1 + 0.012 * np.sin(2 * np.pi * 7 * along * length)
        multiples = hertz.max() * np.arange(1, 13)
        shut = formants(multiples, ((550 * size, 200), (2300 * size, 500)))
        wide = formants(multiples, ((1000 * size, 300), (1700 * size, 400), (3300 * size, 700)))
        mouth = np.sin(np.pi * along) ** 2
        angle = phase(hertz)
        meow = harmonics(angle, shut, hertz.max()) * (1 - mouth)
        meow += harmonics(angle, wide, hertz.max()) * mouth
        add(waves, start, meow * swell(len(along), 0.08, 0.15))
    return waves


def cow(rng: Generator, seconds: float) -> Array:
    """A moo: low, long, nasal at first and then open."""
    time = clock(seconds)
    along = np.linspace(0, 1, len(time))
    hertz = between(rng, 105, 175) * (0.8 + 0.3 * np.sin(np.pi * np.minimum(along * 1.2, 1)))
    hertz *= 1 + 0.012 * wander(rng, len(time), 12)
    size = between(rng, 0.85, 1.15)
    multiples = hertz.max() * np.arange(1, 20)
    shut = formants(multiples, ((260 * size, 90), (900 * size, 120)))
    wide = formants(multiples, ((480 * size, 130), (850 * size, 180), (2300 * size, 500)))
    mouth = np.clip((along - rng.uniform(0.15, 0.35)) * 6, 0, 1)
    angle = phase(hertz)
    moo = harmonics(angle, shut, hertz.max()) * (1 - mouth)
    moo += harmonics(angle, wide, hertz.max()) * mouth
    return moo * swell(len(time), 0.12, rng.uniform(0.15, 0.4))


def helicopter(rng: Generator, seconds: float) -> Array:
    """Blades that chop the air ten to eighteen times a second."""
    time = clock(seconds)
    turn = phase(between(rng, 10, 18) * (1 + 0.01 * wander(rng, len(time), 1))) / (2 * np.pi)
    chop = np.exp(-(((turn % 1) - 0.3) ** 2) / rng.uniform(0.004, 0.012))
    air = band(rng, len(time), 60, between(rng, 300, 700), -3)
    thump = np.sin(2 * np.pi * between(rng, 60, 100) * (turn % 1) / 14)
    whine = rng.uniform(0.02, 0.08) * np.sin(2 * np.pi * between(rng, 900, 1800) * time)
    return chop * (air + thump) + 0.15 * air + whine


def sawing(rng: Generator, seconds: float) -> Array:
    """Strokes through wood, there and back, the way back softer and higher."""
    waves = np.zeros(len(clock(seconds)))
    stroke, teeth = between(rng, 0.2, 0.4), between(rng, 55, 110)
    centre = between(rng, 900, 1800)
    for i, start in enumerate(beats(rng, seconds, stroke * 1.12, 0.04)):
        time = clock(stroke)
        back = i % 2
        rasp = band(rng, len(time), centre * (0.9 if back else 0.6), centre * (2.4 if back else 2))
        grain = 0.55 + 0.45 * np.sin(2 * np.pi * teeth * time * (1.1 if back else 1))
        shape = swell(len(time), stroke * 0.35, stroke * 0.35)
        add(waves, start, rasp * grain * shape, 0.5 if back else 1.0)
    return waves


def drum(rng: Generator, seconds: float) -> Array:
    """A rhythm on one drum: the skin's pitch drops after each blow."""
    waves = np.zeros(len(clock(seconds)))
    hertz, fade = between(rng, 85, 190), between(rng, 0.07, 0.16)
    step = between(rng, 0.13, 0.24)
    pattern = rng.random(8) < 0.6
    pattern[0] = True
    time = clock(0.5)
    skin = np.sin(phase(hertz * (1 + 0.7 * np.exp(-time / 0.025))))
    skin += 0.4 * np.sin(phase(1.59 * hertz * (1 + 0.5 * np.exp(-time / 0.02))))
    blow = skin * np.exp(-time / fade)
    blow[:800] += 0.35 * band(rng, 800, 800, 4000) * np.exp(-np.arange(800) / 120)
    for i, start in enumerate(beats(rng, seconds, step, 0.02)):
        if pattern[i % 8]:
            add(waves, start, blow, 1.0 if i % 4 == 0 else rng.uniform(0.5, 0.8))
    return waves


def frog(rng: Generator, seconds: float) -> Array:
    """Croaks: bursts of pulses, thirty to sixty a second, in a wide mouth."""
    waves = np.zeros(len(clock(seconds)))
    rate, mouth = between(rng, 28, 60), between(rng, 600, 1300)
    length = between(rng, 0.15, 0.4)
    pulse = ring(clock(0.03), (mouth, mouth * 1.9), (150, 220), (1, 0.5))
    for start in beats(rng, seconds, length + rng.uniform(0.15, 0.5), 0.1):
        count = round(length * rate)
        for i in range(count):
            level = np.sin(np.pi * (i + 1) / (count + 1)) ** 0.5
            add(waves, start + i / (rate * (1 + 0.2 * i / count)), pulse, level)
    return waves


def bee(rng: Generator, seconds: float) -> Array:
    """A buzz that comes nearer, passes and turns."""
    time = clock(seconds)
    curve = wander(rng, len(time), between(rng, 0.8, 2.5))
    hertz = between(rng, 170, 260) * (1 + 0.05 * curve + 0.01 * wander(rng, len(time), 20))
    levels = rng.uniform(0.5, 1, 24) / np.arange(1, 25) ** 0.5
    near = 2 ** (1.0 * wander(rng, len(time), between(rng, 0.8, 2)))
    return near * harmonics(phase(hertz), levels, hertz.max())


@dataclass(frozen=True)
class Sound:
    make: Callable[[Generator, float], Array]
    noun: str  # "a siren"
    caption: str  # "A siren is wailing."


SOUNDS = {
    "siren": Sound(siren, "a siren", "A siren is wailing."),
    "bell": Sound(bell, "a bell", "A bell is ringing."),
    "applause": Sound(applause, "applause", "People are clapping."),
    "rain": Sound(rain, "rain", "Rain is falling."),
    "heartbeat": Sound(heartbeat, "a heartbeat", "A heart is beating."),
    "whistle": Sound(whistle, "a whistle", "Someone is whistling."),
    "engine": Sound(engine, "an engine", "An engine is running."),
    "glass": Sound(glass, "breaking glass", "Glass is breaking."),
    "knock": Sound(knock, "a knock", "Someone is knocking on a door."),
    "alarm": Sound(alarm, "an alarm clock", "An alarm clock is beeping."),
    "ticking": Sound(ticking, "a clock", "A clock is ticking."),
    "footsteps": Sound(footsteps, "footsteps", "Someone is walking."),
    "bird": Sound(bird, "a bird", "A bird is singing."),
    "dog": Sound(dog, "a dog", "A dog is barking."),
    "telephone": Sound(telephone, "a telephone", "A telephone is ringing."),
    "wind": Sound(wind, "wind", "The wind is blowing."),
    "thunder": Sound(thunder, "thunder", "Thunder is rolling."),
    "dripping": Sound(dripping, "dripping water", "Water is dripping."),
    "horn": Sound(horn, "a car horn", "A car is honking."),
    "typing": Sound(typing, "a keyboard", "Someone is typing on a keyboard."),
    "cricket": Sound(cricket, "a cricket", "A cricket is chirping."),
    "cat": Sound(cat, "a cat", "A cat is meowing."),
    "cow": Sound(cow, "a cow", "A cow is mooing."),
    "helicopter": Sound(helicopter, "a helicopter", "A helicopter is flying."),
    "sawing": Sound(sawing, "a saw", "Someone is sawing wood."),
    "drum": Sound(drum, "a drum", "Someone is playing a drum."),
    "frog": Sound(frog, "a frog", "A frog is croaking."),
    "bee": Sound(bee, "a bee", "A bee is buzzing."),
}


def sound(name: str, rng: Generator, seconds: float = 2.0) -> Array:
    """A sound of SOUNDS: (seconds * 16000,), at an arbitrary level. At least half a second."""
    if name not in SOUNDS:
        raise ValueError(f"sound {name!r}: it is one of {', '.join(SOUNDS)}")
    return SOUNDS[name].make(rng, max(seconds, 0.5))


# Music


def piano(rng: Generator, hertz: float, seconds: float) -> Array:
    """A struck string: slightly stretched harmonics that fade, the high ones first."""
    time = clock(seconds + 0.25)
    number = np.arange(1, 11)
    tones = hertz * number * np.sqrt(1 + 0.0004 * number**2)
    levels = 1 / number**1.3 * (1 - 0.4 * (number % 7 == 0))
    note = ring(time, tones, 2.2 + 0.9 * number * hertz / 440, levels)
    note[:240] += 0.06 * rng.standard_normal(240) * np.exp(-np.arange(240) / 60)
    return note * swell(len(time), 0.002, 0.12)


def flute(rng: Generator, hertz: float, seconds: float) -> Array:
    """Nearly a sine, with breath, and a vibrato once it stands."""
    time = clock(seconds)
    wave = 1 + 0.006 * np.minimum(time * 4, 1) * np.sin(2 * np.pi * 5.2 * time)
    tone = harmonics(phase(hertz * wave), (1, 0.22, 0.06, 0.02), hertz)
    breath = 0.05 * band(rng, len(time), hertz, min(3 * hertz, 7000))
    return (tone + breath) * swell(len(time), min(0.06, seconds / 3), min(0.05, seconds / 3))


def organ(rng: Generator, hertz: float, seconds: float) -> Array:
    """Pipes of five lengths, at full strength from start to end."""
    time = clock(seconds)
    levels = np.zeros(16)
    levels[[0, 1, 3, 5, 7, 11, 15]] = (1, 0.8, 0.6, 0.3, 0.4, 0.2, 0.2)
    below = 0.7 * np.sin(np.pi * hertz * time)
    return (harmonics(2 * np.pi * hertz * time, levels, hertz) + below) * swell(
        len(time), 0.015, 0.03
    )


def violin(rng: Generator, hertz: float, seconds: float) -> Array:
    """A bowed string: all harmonics, a slow start and a wide vibrato."""
    time = clock(seconds)
    vibrato = 1 + 0.012 * np.minimum(time * 3, 1) * np.sin(2 * np.pi * 6 * time)
    number = np.arange(1, 25)
    body = formants(hertz * number, ((500, 250), (1100, 400), (2600, 900))) + 0.25
    tone = harmonics(phase(hertz * vibrato), body / number**0.7, hertz * 1.02)
    return tone * swell(len(time), min(0.12, seconds / 2.5), min(0.06, seconds / 4))


def trumpet(rng: Generator, hertz: float, seconds: float) -> Array:
    """Brass: brighter the louder, a firm tongue at the start."""
    time = clock(seconds)
    angle = phase(hertz * (1 - 0.03 * np.exp(-time / 0.02)))
    soft, loud = 0.45 ** np.arange(14), 0.86 ** np.arange(14)
    bright = np.minimum(time / 0.05, 1) * np.exp(-time / 1.5)
    tone = harmonics(angle, soft, hertz) * (1 - bright) + harmonics(angle, loud, hertz) * bright
    return tone * swell(len(time), 0.02, min(0.05, seconds / 4))


def xylophone(rng: Generator, hertz: float, seconds: float) -> Array:
    """Wooden bars: few partials, gone at once."""
    time = clock(seconds + 0.1)
    note = ring(time, (2 * hertz, 6 * hertz, 13 * hertz), (11, 28, 55), (1, 0.5, 0.25))
    note[:80] += 0.2 * rng.standard_normal(80) * np.exp(-np.arange(80) / 15)
    return note


TIMBRES = {
    "piano": piano,
    "flute": flute,
    "organ": organ,
    "violin": violin,
    "trumpet": trumpet,
    "xylophone": xylophone,
}
SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10), (0, 2, 4, 7, 9), tuple(range(12)))


def melody(rng: Generator, direction: str, tempo: str, timbre: str) -> Array:
    """Notes of one scale, each above (rising) or below (falling) the last; one to four seconds.

    fast is five to eight notes a second, slow is one and a half to two and a half
    """
    if direction not in DIRECTIONS or tempo not in TEMPOS or timbre not in TIMBRES:
        raise ValueError(
            f"melody {direction!r}, {tempo!r}, {timbre!r}: direction is one of "
            f"{', '.join(DIRECTIONS)}, tempo {', '.join(TEMPOS)}, timbre {', '.join(TIMBRES)}"
        )
    if tempo == "fast":
        step, count = between(rng, 1 / 8, 1 / 5), int(rng.integers(7, 11))
    else:
        step, count = between(rng, 1 / 2.5, 1 / 1.5), int(rng.integers(4, 7))
    scale = SCALES[rng.integers(len(SCALES))]
    degrees = np.cumsum(rng.choice((1, 1, 1, 2), count))
    notes = [12 * (d // len(scale)) + scale[d % len(scale)] for d in degrees]
    if direction == "falling":
        notes.reverse()
    base = between(rng, 200, 420)
    waves = np.zeros(round((count * step + 0.35) * RATE))
    for i, note in enumerate(notes):
        sounding = step * rng.uniform(0.85, 1.0)
        tone = TIMBRES[timbre](rng, base * 2 ** (note / 12), sounding)
        add(waves, i * step, tone, rng.uniform(0.8, 1.0))
    return waves


# Noise


def noise(rng: Generator, kind: str, seconds: float) -> Array:
    """Steady noise with unit RMS: (seconds * 16000,).

    white: equal power per hertz; pink: falls by 3 dB an octave; brown: by 6 dB; hum: mains, 50 or
    60 Hz with its harmonics. Power below 20 Hz is left out.
    """
    length = max(1, round(seconds * RATE))
    if kind == "white":
        waves = rng.standard_normal(length, dtype=np.float32)
    elif kind in ("pink", "brown"):
        size = fast_size(length)
        hertz = np.arange(size // 2 + 1) * (RATE / size)
        gain = np.where(hertz < 20, 0.0, np.maximum(hertz, 20) ** (-0.5 if kind == "pink" else -1))
        waves = np.fft.irfft(spectrum(rng, size) * gain.astype(np.float32), size)[:length]
    elif kind == "hum":
        time = np.arange(RATE // 10) / RATE  # after which both mains repeat
        base = rng.choice((50.0, 60.0))
        period = np.zeros(len(time))
        for harmonic in range(1, 9):
            start = rng.uniform(0, 2 * np.pi)
            level = rng.uniform(0.3, 1.0) / harmonic
            period += level * np.sin(2 * np.pi * base * harmonic * time + start)
        waves = np.resize(period, length)
    else:
        raise ValueError(f"noise {kind!r}: it is one of {', '.join(NOISES)}")
    return waves / max(np.sqrt(np.square(waves).mean()), 1e-9)


# Descriptions


def draw(rng: random.Random, test: bool = False) -> dict:
    """A clip of a sound (three in four) or a melody, as render.py takes it.

    test  noise and room as the training never has them
    """
    clip: dict
    if rng.random() < 0.75:
        name = rng.choice(list(SOUNDS))
        clip = {"kind": "sound", "name": name, "seconds": round(rng.uniform(1.2, 3.0), 2)}
    else:
        clip = {
            "kind": "melody",
            "direction": rng.choice(DIRECTIONS),
            "tempo": rng.choice(TEMPOS),
            "timbre": rng.choice(list(TIMBRES)),
        }
    clip["gain_db"] = round(rng.uniform(-12, -1), 1)
    if rng.random() < 0.3:
        snr_db = rng.choice((17, 22) if test else (15, 20, 25, 30))
        clip["noise"] = {"kind": rng.choice(NOISES), "snr_db": snr_db}
    if rng.random() < 0.3:
        clip["reverb"] = round(rng.uniform(0.45, 0.55) if test else rng.uniform(0.1, 0.4), 2)
    return clip


def caption(clip: dict) -> str:
    """What a sound or melody description holds, as a sentence."""
    if clip["kind"] == "sound":
        return SOUNDS[clip["name"]].caption
    article = "An" if clip["timbre"][0] in "aeiou" else "A"
    return f"{article} {clip['timbre']} plays a {clip['tempo']} {clip['direction']} melody."
