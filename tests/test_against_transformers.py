"""The whole model against transformers, on random weights through files in the published layout.

The reference always hears what it demands: clips padded to 30 s by its own feature extractor, with
its mask. We compute only the frames that carry sound. Every parity test has a control that fails.
"""

from types import SimpleNamespace

import oracle
import pytest
import torch

from qwen2audio_core import chat, ops
from qwen2audio_core.encoder import AudioEncoder
from qwen2audio_core.frontend import clip_lengths
from qwen2audio_core.generate import generate
from qwen2audio_core.sampling import Settings
from qwen2audio_core.tokenizer import Tokenizer
from qwen2audio_core.weights import load_model

transformers = pytest.importorskip("transformers")
# Before 5.23 the reference lets padding count as a repetition, which makes a batch differ from its
# rows run alone. Then its rows are the oracle, one by one.
PADDING_IS_PENALISED = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)


def clip(samples, seed):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, generator=generator) * 0.1
    return noise * torch.linspace(0.2, 1.0, samples)


def user(*content):
    items = [
        {"type": "text", "text": c}
        if isinstance(c, str)
        else {"type": "audio", "audio": clip(*c), "sampling_rate": 16000}
        for c in content
    ]
    return {"role": "user", "content": items}


def says(text):
    return {"role": "assistant", "content": text}


CONVERSATIONS = [
    [user("What is the weather like?")],
    [user((16000, 1))],
    [user((48000, 2), "What's that sound?")],
    [user((321, 3), "Short?")],
    [user((960, 4), "One token?")],
    [user((961, 5), "Two?")],
    [user((16159, 6), "这是什么声音？")],
    [user((16161, 7), (30001, 8), "Which of the two is louder?")],
    [user("Before the clip: ", (20480, 9), " and after it.")],
    [user((25000, 10)), says("A bell."), user("And then?")],
    [user((25000, 11)), says("A bell."), user((5000, 12), "And this?")],
    [
        user((9000, 13), "a"),
        says("b"),
        user((9001, 14), "c"),
        says("d"),
        user((9160, 15), (400, 16)),
    ],
    [{"role": "system", "content": "You are a parrot."}, user((40000, 17), "Repeat.")],
    [{"role": "system", "content": "Antworte kurz."}, user("Wer bist du?")],
    [user((123456, 18), "どんな音ですか？")],
    [user((479999, 19), "Thirty seconds.")],
    [user((31999, 20), (31999, 21), (31999, 22), "Three clips 🎧🎶.")],
    [user((64000, 23), "x" * 200)],
    [user((7777, 24), "Ответь по-русски.")],
    [user((12345, 25)), says(""), user((54321, 26), "Compare.")],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    reference = oracle.reference_model(oracle.tiny_config())
    return oracle.save_official(reference, tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def pair(folder):
    ours, reference = oracle.load_both(folder)
    return SimpleNamespace(ours=ours, reference=reference, tokenizer=Tokenizer.from_folder(folder))


@pytest.fixture(scope="module")
def extractor():
    return transformers.WhisperFeatureExtractor(feature_size=128)


def features_of(extractor, clips):
    """The reference's inputs for clips: 30 s each, and its mask."""
    features = extractor(
        [c.numpy() for c in clips],
        sampling_rate=16000,
        padding="max_length",
        return_attention_mask=True,
        return_tensors="pt",
    )
    return {
        "input_features": features["input_features"],
        "feature_attention_mask": features["attention_mask"],
    }


def inputs_for(extractor, prompts, batch):
    clips = [c for prompt in prompts for c in prompt.clips]
    inputs = {"input_ids": batch.ids, "attention_mask": batch.attention_mask}
    return inputs | (features_of(extractor, clips) if clips else {})


def prompts_of(pair, conversations=CONVERSATIONS):
    return [chat.encode(messages, pair.tokenizer) for messages in conversations]


def pad_of(pair):
    return pair.tokenizer.id_of("<|endoftext|>")


# --- encoder --------------------------------------------------------------------------------------

LENGTHS = [321, 641, 961, 16000, 16159, 16161, 160000, 479681, 480000]


class Encoders:
    """Both encoders on the same weights; what the reference says of each clip is kept."""

    def __init__(self, extractor, dtype):
        config = oracle.tiny_config()
        self.reference = oracle.reference_model(config, dtype=dtype).model.audio_tower
        self.ours = AudioEncoder(config.audio).to(dtype).eval()
        self.ours.load_state_dict(self.reference.state_dict())
        self.clips = [clip(samples, seed) for seed, samples in enumerate(LENGTHS)]
        self.lengths = [clip_lengths(samples) for samples in LENGTHS]
        self.mel = features_of(extractor, self.clips)["input_features"].to(dtype)
        self.expected = [
            self._states(mel[None], one.conv_frames)[0, : one.audio_tokens]
            for mel, one in zip(self.mel, self.lengths, strict=True)
        ]

    @torch.no_grad()
    def _states(self, mel, frames):
        """The reference over 30 s, with the key mask its model builds from the valid frames."""
        hidden = torch.arange(1500) >= frames
        mask = torch.zeros(1, 1, 1500, 1500, dtype=mel.dtype)
        mask = mask.masked_fill(hidden, torch.finfo(mel.dtype).min)
        return self.reference(mel, attention_mask=mask).last_hidden_state

    @torch.no_grad()
    def error(self, bend=lambda mel, frames: (mel, frames), rows=None):
        """Largest difference over the valid audio states of clips run one by one."""
        worst = 0.0
        for i in range(len(LENGTHS)) if rows is None else rows:
            one = self.lengths[i]
            mel, frames = bend(self.mel[i : i + 1, :, : one.input_frames], one.conv_frames)
            states = self.ours(mel, torch.tensor([frames]))[0, : one.audio_tokens]
            worst = max(worst, (states - self.expected[i]).abs().max().item())
        return worst


@pytest.fixture(scope="module")
def in_float64(extractor):
    return Encoders(extractor, torch.float64)


def test_encoder_in_float64(in_float64):
    assert in_float64.error() <= 1e-10


def test_encoder_in_float32(extractor):
    assert Encoders(extractor, torch.float32).error() <= 1e-5


@pytest.mark.parametrize(
    "bend",
    [
        lambda mel, frames: (mel[:, :, :-1], frames),
        lambda mel, frames: (mel[:, :, : 2 * frames - 1], frames),
        lambda mel, frames: (mel, frames + 1),
    ],
    ids=["2F mel frames", "2F - 1 mel frames", "one conv frame too many"],
)
def test_encoder_control_wrong_frames(in_float64, bend):
    assert in_float64.error(bend, rows=[3, 4, 5]) > 1e-4


def test_encoder_in_a_batch_of_mixed_lengths(in_float64):
    mel = in_float64.mel.clone()
    for row, one in zip(mel, in_float64.lengths, strict=True):
        row[:, one.input_frames :] = 123.0  # whatever stands behind a clip must not be heard
    frames = torch.tensor([one.conv_frames for one in in_float64.lengths])
    with torch.no_grad():
        states = in_float64.ours(mel, frames)
    for row, expected in zip(states, in_float64.expected, strict=True):
        assert (row[: len(expected)] - expected).abs().max() <= 1e-10


# --- logits ---------------------------------------------------------------------------------------


def logits_of(pair, extractor, conversation, model=None):
    """(ours, theirs), float32, of one conversation."""
    prompts = prompts_of(pair, [conversation])
    batch = chat.collate(prompts, pad_of(pair))
    with torch.no_grad():
        ours = (model or pair.ours)(batch.ids, batch.mel, batch.conv_frames, batch.attention_mask)
        theirs = pair.reference(**inputs_for(extractor, prompts, batch)).logits
    return ours, theirs


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("i", range(len(CONVERSATIONS)))
def test_logits_in_float32(pair, extractor, i):
    assert relative(*logits_of(pair, extractor, CONVERSATIONS[i])) <= 2e-5


def bent_models(folder):
    """Models that are wrong in one place each."""

    def rms_eps(model):
        for module in model.modules():
            if hasattr(module, "rms_norm_op"):
                module.eps = 1e-3

    def interleaved_rope(model):
        def wrong(q, k, cos, sin):
            def turn(x):
                pairs = x.unflatten(-1, (-1, 2))
                c, s = cos.unsqueeze(-2), sin.unsqueeze(-2)
                first, second = pairs.unbind(-1)
                turned = torch.stack((first * c - second * s, second * c + first * s), -1)
                return turned.flatten(-2)

            return turn(q), turn(k)

        for layer in model.language_model.model.layers:
            layer.self_attn.rope_op = wrong

    def tanh_gelu(model):
        for module in model.audio_tower.modules():
            if hasattr(module, "gelu_op"):
                module.gelu_op = lambda x: torch.nn.functional.gelu(x, approximate="tanh")

    def swapped_gate(model):
        for layer in model.language_model.model.layers:
            layer.mlp.swiglu_op = lambda gate, up: ops.swiglu(up, gate)

    def no_key_mask(model):
        for layer in model.language_model.model.layers:
            layer.self_attn.attention_op = lambda q, k, v, causal, key_start: ops.sdpa(q, k, v)

    for bend in (rms_eps, interleaved_rope, tanh_gelu, swapped_gate, no_key_mask):
        model = load_model(folder)
        bend(model)
        yield bend.__name__, model


def test_logits_control_wrong_models(pair, extractor, folder):
    for name, model in bent_models(folder):
        error = relative(*logits_of(pair, extractor, CONVERSATIONS[2], model))
        assert error > 2e-5, name


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_a_padded_batch(pair, extractor, side):
    prompts = prompts_of(pair, CONVERSATIONS[:8])
    batch = chat.collate(prompts, pad_of(pair))
    ids, mask = batch.ids, batch.attention_mask
    if side == "right":
        order = torch.argsort(mask, dim=1, descending=True, stable=True)
        ids, mask = ids.gather(1, order), mask.gather(1, order)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    clips = [c for prompt in prompts for c in prompt.clips]
    with torch.no_grad():
        ours = pair.ours(ids, batch.mel, batch.conv_frames, mask)
        theirs = pair.reference(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            **features_of(extractor, clips),
        ).logits
    assert relative(ours[mask.bool()], theirs[mask.bool()]) <= 2e-5
    assert ours.isfinite().all()


def norm_in_bfloat16(x, weight, eps):
    """A planted mistake: statistics in the dtype of x, where ops.rms_norm takes float32."""
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


def larger(excess):
    """Whether a mean is above 0 by more than chance: by three standard errors, which are small."""
    error = excess.std() / len(excess) ** 0.5
    return bool(excess.mean() > 3 * error or error > 0.003)


def test_bfloat16_is_as_near_to_float32_as_the_reference(pair, extractor, tmp_path):
    """Paired by weights: the same eight prompts through both, for eight sets of weights.

    The quantity is the mean error of our logits against float32 over that of the reference's, less
    1. Weights are drawn independently, and so are these; prompts under the same weights are not.
    """
    inputs = []
    for prompt in prompts_of(pair, CONVERSATIONS[1:9]):
        batch = chat.collate([prompt], pad_of(pair))
        inputs.append((batch, inputs_for(extractor, [prompt], batch)))
    found = []
    for seed in range(8):
        reference = oracle.reference_model(oracle.tiny_config(), seed)
        folder = oracle.save_official(reference, tmp_path / str(seed))
        exact = load_model(folder)
        ours, theirs = oracle.load_both(folder, torch.bfloat16)
        wrong = load_model(folder, dtype=torch.bfloat16)
        for module in wrong.modules():
            if hasattr(module, "rms_norm_op"):
                module.rms_norm_op = norm_in_bfloat16
        errors = torch.zeros(3, dtype=torch.float64)
        for batch, features in inputs:
            given = (batch.ids, batch.mel, batch.conv_frames, batch.attention_mask)
            with torch.no_grad():
                truth = exact(*given)
                logits = (ours(*given), wrong(*given), theirs(**features).logits)
            errors += torch.stack([(one.float() - truth).abs().mean() for one in logits])
        found.append(errors[:2] / errors[2] - 1)
    excess, planted = torch.stack(found).unbind(1)
    print(f"bf16 error over the reference's, less 1: {excess.tolist()}, planted {planted.tolist()}")
    assert not larger(excess), excess
    assert planted.mean() > 2 * planted.std() / len(planted) ** 0.5, planted  # the control


# --- generated ids --------------------------------------------------------------------------------


def published_settings(pair, **changes):
    end = pad_of(pair)
    values = {
        "max_new_tokens": 64,
        "eos_token_ids": (end, pair.tokenizer.id_of("<|im_end|>")),
        "pad_token_id": end,
        "repetition_penalty": 1.1,
    }
    return Settings(**values | changes)


def reference_ids(pair, extractor, prompts, settings, seed=None):
    batch = chat.collate(prompts, settings.pad_token_id)
    if seed is not None:
        torch.manual_seed(seed)
    options = {
        "max_new_tokens": settings.max_new_tokens,
        "do_sample": settings.do_sample,
        "repetition_penalty": settings.repetition_penalty,
        "eos_token_id": list(settings.eos_token_ids),
        "pad_token_id": settings.pad_token_id,
    }
    if settings.min_new_tokens:
        options["min_new_tokens"] = settings.min_new_tokens
    if settings.do_sample:
        options |= {
            "temperature": settings.temperature,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
        }
    out = pair.reference.generate(**inputs_for(extractor, prompts, batch), **options)
    rows = []
    for row in out[:, batch.ids.shape[1] :].tolist():
        ends = [i for i, token in enumerate(row) if token in settings.eos_token_ids]
        rows.append(row[: ends[0] + 1] if ends else row)
    return rows


def our_ids(pair, prompts, settings, **options):
    batch = chat.collate(prompts, settings.pad_token_id)
    return [answer.ids for answer in generate(pair.ours, batch, settings, **options)]


def test_greedy_ids_of_20_conversations_in_one_batch(pair, extractor):
    prompts = prompts_of(pair)
    settings = published_settings(pair)
    assert len(prompts) == 20
    ours = our_ids(pair, prompts, settings)
    for prompt, ids in zip(prompts, ours, strict=True):
        if prompt.audio_tokens and max(prompt.audio_tokens) == 1:
            continue  # alone, the reference takes these for prompts of its old kind and fails
        assert ids == reference_ids(pair, extractor, [prompt], settings)[0]
    if not PADDING_IS_PENALISED:
        assert ours == reference_ids(pair, extractor, prompts, settings)
    assert len({tuple(ids) for ids in ours}) == 20  # the answers do depend on the prompts


def test_greedy_control_without_the_penalty(pair, extractor):
    prompts = prompts_of(pair)[:4]
    theirs = reference_ids(pair, extractor, prompts[:1], published_settings(pair))
    assert our_ids(pair, prompts[:1], published_settings(pair, repetition_penalty=1.0)) != theirs


def test_greedy_control_another_clip(pair, extractor):
    heard = prompts_of(pair, [[user((48000, 2), "What's that sound?")]])
    other = prompts_of(pair, [[user((48000, 99), "What's that sound?")]])
    settings = published_settings(pair)
    assert our_ids(pair, other, settings) != reference_ids(pair, extractor, heard, settings)


@pytest.mark.parametrize(
    "drawing",
    [
        {"temperature": 0.7, "top_k": 20, "top_p": 0.5},  # the published settings
        {"temperature": 1.5, "top_k": 200, "top_p": 0.95},
        {"temperature": 1.0, "top_k": 0, "top_p": 0.9},
    ],
    ids=["published", "hot", "nucleus"],
)
def test_sampled_ids_under_one_seed(pair, extractor, drawing):
    settings = published_settings(pair, do_sample=True, **drawing)
    for i in (2, 7, 11):
        prompt = prompts_of(pair, [CONVERSATIONS[i]])
        for seed in (0, 1):
            theirs = reference_ids(pair, extractor, prompt, settings, seed)
            assert our_ids(pair, prompt, settings, seed=seed) == theirs
    if drawing["temperature"] > 1:
        assert our_ids(pair, prompt, settings, seed=2) != theirs


def test_min_new_tokens(pair, extractor):
    ends = tuple(range(0, 3000, 2))  # half of the vocabulary ends an answer
    settings = published_settings(
        pair, min_new_tokens=5, eos_token_ids=(*ends, pad_of(pair)), max_new_tokens=20
    )
    prompt = prompts_of(pair, [CONVERSATIONS[2]])
    ours = our_ids(pair, prompt, settings)
    assert ours == reference_ids(pair, extractor, prompt, settings)
    assert 5 < len(ours[0]) < 20


def test_several_answers_with_several_clips(pair, extractor):
    """The reference gives the second answer the wrong clips; here every answer equals the first."""
    prompts = prompts_of(pair, [CONVERSATIONS[7], CONVERSATIONS[16]])
    settings = published_settings(pair, max_new_tokens=24)
    single = [reference_ids(pair, extractor, [p], settings)[0] for p in prompts]
    ours = our_ids(pair, prompts, settings, answers=3)
    assert ours == [single[0]] * 3 + [single[1]] * 3
