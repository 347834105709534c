"""The log-mel frontend against the published one, and the lengths against its formulas."""

import numpy as np
import pytest
import torch

from qwen2audio_core import frontend
from qwen2audio_core.errors import AudioError
from qwen2audio_core.frontend import clip_lengths, log_mel, mel_filters

TOLERANCE = 2e-5
AWKWARD = [1, 160, 319, 320, 321, 322, 323, 961, 15999, 16000, 16001]
AWKWARD += [479680, 479681, 479840, 479999, 480000]


@pytest.fixture(scope="module")
def extractor():
    transformers = pytest.importorskip("transformers")
    return transformers.WhisperFeatureExtractor(feature_size=128)


def published(extractor, waveform):
    """The reference's log-mel of the whole 30 s, (128, 3000), and its count of valid frames."""
    features = extractor(
        waveform.numpy(),
        sampling_rate=16000,
        padding="max_length",
        return_attention_mask=True,
        return_tensors="pt",
    )
    return features["input_features"][0], int(features["attention_mask"].sum())


def signal(samples, seed=0):
    """Noise, a tone and a fade, so that every frame differs."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, generator=generator) * 0.05
    tone = torch.sin(torch.arange(samples) * 0.3) * torch.linspace(1, 0.01, samples)
    return noise + 0.3 * tone


def worst(extractor, waveform, compute=log_mel):
    ours = compute(waveform)
    reference, frames = published(extractor, waveform)
    lengths = clip_lengths(len(waveform))
    assert frames == lengths.mel_frames
    assert ours.shape == (128, lengths.input_frames)
    return (ours - reference[:, : ours.shape[1]]).abs().max().item() if ours.numel() else 0.0


@pytest.mark.parametrize("samples", AWKWARD)
def test_random_signals_of_awkward_lengths(extractor, samples):
    assert worst(extractor, signal(samples)) <= TOLERANCE


def test_no_samples(extractor):
    reference, frames = published(extractor, torch.zeros(1))
    assert log_mel(torch.zeros(0)).shape == (128, 0)
    assert clip_lengths(0) == (0, 0, 0, 0)
    assert frames == 1 and reference.shape == (128, 3000)


@pytest.mark.parametrize("samples", [16000, 16159, 479839])
def test_a_clip_whose_maximum_lies_at_its_end(extractor, samples):
    waveform = torch.zeros(samples)
    waveform[-3:] = torch.tensor([0.9, -0.9, 0.9])
    assert worst(extractor, waveform) <= TOLERANCE


def test_silence_and_a_constant(extractor):
    assert worst(extractor, torch.zeros(16000)) == 0
    assert worst(extractor, torch.full((16000,), 0.5)) <= TOLERANCE


def test_real_clips(extractor, shared):
    soundfile = pytest.importorskip("soundfile")
    soxr = pytest.importorskip("soxr")
    files = [f for f in sorted((shared / "audio").iterdir()) if f.suffix not in (".md", ".m4a")]
    assert len(files) >= 15
    for file in files:
        samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
        samples = samples.mean(1)
        if rate != 16000:
            samples = soxr.resample(samples, rate, 16000)
        for start in range(0, len(samples), 480000):
            waveform = torch.from_numpy(np.ascontiguousarray(samples[start : start + 480000]))
            assert worst(extractor, waveform) <= TOLERANCE, file.name


def test_float64_is_the_truth_that_float32_rounds():
    waveform = signal(48000)
    exact = log_mel(waveform.double())
    assert exact.dtype == torch.float64
    assert (log_mel(waveform) - exact).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "wrong",
    [
        lambda w: torch.roll(log_mel(w), 1, dims=1),
        lambda w: log_mel(torch.roll(w, 1)),
        lambda w: log_mel(w * 1.001),
        lambda w: log_mel(w.flip(0)),
    ],
    ids=["one frame late", "one sample late", "a little louder", "backwards"],
)
def test_negative_control(extractor, wrong):
    assert worst(extractor, signal(16000), wrong) > TOLERANCE


def test_filters(extractor):
    ours = mel_filters()
    assert torch.equal(ours, torch.from_numpy(extractor.mel_filters.T).float())
    librosa = pytest.importorskip("librosa")
    reference = librosa.filters.mel(sr=16000, n_fft=400, n_mels=128, norm="slaney", htk=False)
    assert np.abs(ours.numpy() - reference).max() <= 1e-8
    torchaudio = pytest.importorskip("torchaudio")  # works in float32, on frequencies up to 8,000
    other = torchaudio.functional.melscale_fbanks(201, 0, 8000, 128, 16000, "slaney", "slaney")
    assert (ours - other.T).abs().max() <= 5e-7


def test_filter_statistics():
    filters = mel_filters()
    assert int((filters != 0).sum()) == 394
    assert filters.sum().item() == pytest.approx(3.19099, abs=1e-5)
    assert filters.max().item() == pytest.approx(0.0416817, abs=1e-7)
    assert filters[0].nonzero().flatten().tolist() == [1]
    assert filters[-1].nonzero().flatten().tolist() == list(range(191, 200))


def published_lengths(samples):
    """The published formulas, vectorised over N: the mask's ones, then the encoder's two."""
    frames = -(-samples // 160)  # ones in the sample mask taken every 160 samples
    conv = (frames - 1) // 2 + 1
    return frames, conv, np.maximum((conv - 2) // 2 + 1, 0)


def test_lengths_of_every_clip_up_to_30_s():
    frames, conv, tokens = published_lengths(np.arange(480001))
    ours = np.array([clip_lengths(n)[:3] for n in range(480001)])
    assert (ours[:, 0] == frames).all()
    assert (ours[:, 1] == conv).all()
    assert (ours[:, 2] == tokens).all()
    assert (frames // 1 != np.arange(480001) // 160).any()  # the well-known wrong formula


def test_the_mask_formula_is_the_extractors(extractor):
    for samples in (1, 159, 160, 161, 16001, 20479, 20481):
        assert published(extractor, signal(samples))[1] == clip_lengths(samples).mel_frames


def test_gradients_pass_even_after_inference_mode():
    frontend.constants.cache_clear()
    mel_filters.cache_clear()
    with torch.inference_mode():
        log_mel(signal(5000))
    waveform = signal(5000).requires_grad_()
    log_mel(waveform).sum().backward()
    assert waveform.grad.isfinite().all() and (waveform.grad != 0).float().mean() > 0.9


@pytest.mark.parametrize("bands", [1, 2, 3, 80, 128])
def test_value_and_gradient_for_any_number_of_bands(bands):
    """The published code in float64, all frequencies of every band, over the whole 30 s."""
    waveform = signal(20000).double().requires_grad_()
    padded = torch.nn.functional.pad(waveform, (0, 480000 - 20000))
    window = torch.hann_window(400).double()
    stft = torch.stft(padded, 400, 160, window=window, return_complex=True)[:, :-1]
    x = (mel_filters(bands).double() @ stft.abs().square()).clamp(min=1e-10).log10()
    reference = ((torch.maximum(x, x.max() - 8) + 4) / 4)[:, : clip_lengths(20000).input_frames]
    ours = log_mel(waveform, bands)
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-9)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).double()
    mine, theirs = (torch.autograd.grad((y * weight).sum(), waveform)[0] for y in (ours, reference))
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max()))


def test_lengths_at_the_edges():
    assert clip_lengths(320).audio_tokens == 0
    assert clip_lengths(321).audio_tokens == clip_lengths(960).audio_tokens == 1
    assert clip_lengths(480000) == (3000, 1500, 750, 3000)
    with pytest.raises(AudioError, match=r"480001 samples \(30.00 s\) exceeds .* split it"):
        clip_lengths(480001)
    with pytest.raises(AudioError):
        log_mel(torch.zeros(480001))


@pytest.mark.parametrize(
    "waveform", [torch.zeros(2, 16000), torch.zeros(16000, dtype=torch.int16)], ids=["2-D", "int"]
)
def test_shapes_and_dtypes_that_make_no_sense(waveform):
    with pytest.raises(ValueError, match="expected \\(N,\\) of float32 or float64"):
        log_mel(waveform)


def test_frames_behind_the_computed_ones_are_padding(extractor):
    """What is not computed carries no sound: every later frame of the reference is one value."""
    for samples in (321, 16000, 16001, 30000):
        reference, _ = published(extractor, signal(samples))
        beyond = reference[:, clip_lengths(samples).mel_frames + 2 :]
        assert (beyond == beyond[0, 0]).all()
    assert frontend.SECONDS_PER_TOKEN == 0.04
