"""Looking inside: what is recorded is what passed, nothing else is kept, nothing is changed unless
asked, and what cannot be seen is said."""

import gc
import weakref
from dataclasses import replace
from functools import partial

import oracle
import pytest
import torch

from qwen2audio_core import backends, chat, ops, points, probe
from qwen2audio_core.chat import Prompt
from qwen2audio_core.engine import Engine
from qwen2audio_core.errors import InputError
from qwen2audio_core.frontend import clip_lengths
from qwen2audio_core.generate import generate
from qwen2audio_core.layout import Layout
from qwen2audio_core.sampling import Settings
from qwen2audio_core.tokenizer import Tokenizer

GREEDY = Settings(max_new_tokens=4, eos_token_ids=())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    reference = oracle.reference_model(oracle.tiny_config(text={"num_hidden_layers": 3}))
    return oracle.save_official(reference, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def both(folder):
    """(ours, the transformers model, tokenizer) of one checkpoint."""
    return *oracle.load_both(folder), Tokenizer.from_folder(folder)


@pytest.fixture
def model(both):
    return both[0]


def noise(seconds, seed=0):
    return torch.randn(int(16000 * seconds), generator=torch.Generator().manual_seed(seed)) * 0.1


def prompt_of(tokenizer, *clips, text="What is it?"):
    content = [{"audio": clip, "sampling_rate": 16000} for clip in clips] + [text]
    return chat.encode([{"role": "user", "content": content}], tokenizer)


@pytest.fixture(scope="module")
def prompt(both) -> Prompt:
    return prompt_of(both[2], noise(0.6), noise(0.4, 1))


@pytest.fixture(scope="module")
def batch(prompt):
    return chat.collate([prompt], 0)


def logits_of(model, batch):
    with torch.no_grad():
        return probe.run(model, batch)


# What stands where


def test_every_position_of_a_conversation_is_named(both):
    tokenizer = both[2]
    turns = [
        {"role": "user", "content": [{"audio": noise(0.6), "sampling_rate": 16000}, "Hi?\nYes"]},
        {"role": "assistant", "content": "Ja."},
        {"role": "user", "content": ["And", {"audio": noise(0.3), "sampling_rate": 16000}]},
    ]
    prompt = chat.encode(turns, tokenizer, system="Be brief.")
    layout = Layout.of(
        prompt.ids, tokenizer, [*tokenizer.encode("No"), tokenizer.id_of("<|im_end|>")]
    )
    assert len(layout.kinds) == len(layout.ids) == len(layout.pieces) == len(prompt.ids) + 3

    def said(kind):
        return "".join(layout.pieces[i] for i in layout.columns(kind))

    assert said("system") == "Be brief."
    assert said("text") == "Hi?\nYesAnd"
    assert said("answer") == "Ja.No<|im_end|>"
    template = said("template")
    for piece in ("Audio 1: <|audio_bos|>", "Audio 2: <|audio_bos|>", "<|im_start|>assistant\n"):
        assert piece in template
    assert template.count("<|im_start|>") == 5 and "<|AUDIO|>" not in template
    assert len(layout.columns("audio 1")) == 15 and len(layout.columns("audio 2")) == 7
    assert layout.columns("audio") == layout.columns("audio 1") + layout.columns("audio 2")
    answer = layout["answer"]  # the last run: this answer, not the one before
    assert layout.pieces[answer] == ["N", "o", "<|im_end|>"] and answer.stop == len(layout.ids)
    first = layout["audio 2"].start
    assert layout.seconds(first) == (2, 0.0, 0.04)
    assert layout.seconds(first + 6) == (2, pytest.approx(0.24), pytest.approx(0.28))


def test_a_raw_prompt_is_text_around_its_clips(both):
    tokenizer = both[2]
    text = "<|audio_bos|><|AUDIO|><|audio_eos|>Audio 1: caption"
    prompt = chat.encode_raw(text, [(noise(0.5), 16000)], tokenizer)
    layout = Layout.of(prompt.ids, tokenizer, [65, 66])
    kinds = list(dict.fromkeys(layout.kinds))
    assert kinds == ["template", "audio 1", "text", "answer"]
    assert "".join(layout.pieces[layout["text"]]) == "Audio 1: caption"
    with pytest.raises(InputError, match="holds no 'system', it has template, audio 1, text"):
        layout.columns("system")
    with pytest.raises(InputError, match="position 0 is template, no audio token"):
        layout.seconds(0)


def test_a_token_across_the_end_of_the_markup_counts_as_markup():
    marks = ("<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
    words = {10: b"user", 11: b"\n\n", 12: b"Hi", 13: b"\n"}
    words |= {number: mark.encode() for number, mark in enumerate(marks, 1)}

    class Merged:
        """The published tokenizer writes a role's line end and the next as one token."""

        def id_of(self, name):
            return 1 + marks.index(name)

        def bytes_of(self, token, skip_special):
            return words[token]

    layout = Layout.of([1, 10, 11, 12, 2, 13], Merged())
    assert layout.kinds == ["template"] * 3 + ["text"] + ["template"] * 2


# Recording


def test_what_is_recorded_is_what_the_module_returned(model, batch):
    expected = {}
    path = "language_model.model.layers.1.mlp"
    handle = model.get_submodule(path).register_forward_hook(
        lambda module, args, output: expected.update({path: output, path + ":in": args[0]})
    )
    try:
        with torch.no_grad(), probe.record(model, [path, path + ":in"]) as seen:
            before = probe.run(model, batch)
    finally:
        handle.remove()
    assert set(seen) == {path, path + ":in"}
    assert all(torch.equal(seen[name], expected[name]) for name in seen)
    assert torch.equal(before, logits_of(model, batch))  # watching changed nothing
    assert not model.get_submodule(path)._forward_hooks


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("language_model.model.layers.*.mlp", 3),
        ("language_model.model.layers.1-2.mlp", 2),
        ("audio_tower.layers.*", 2),
        ("blocks.0-1.hook_resid_post", 2),
        ("blocks.*.attn.hook_*", 15),  # q, k, v, z and the pattern
        ("audio.blocks.1.hook_mlp_out", 1),
        ("multi_modal_projector", 1),
        ("language_model.model.layers.*.self_attn:pattern", 3),
    ],
)
def test_patterns(model, pattern, found):
    names = [point.name for point in probe.points(model, pattern)]
    assert len(names) == len(set(names)) == found


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("language_model.model.layers.7.mlp", "names nothing in this model"),
        ("blocks.3-9.hook_resid_post", "names nothing"),
        ("blocks.0.hook_resid_post:in", "names nothing"),
        ("language_model.model.layers.0.mlp:weights", "ends in :in, :pattern or neither"),
        ("language_model.model.layers.0.mlp:pattern", "names nothing"),
    ],
)
def test_names_that_do_not_exist(model, pattern, message):
    with pytest.raises(InputError, match=message) as caught, probe.record(model, pattern):
        pass
    assert "\n" not in str(caught.value)


def test_every_name_of_the_table_is_documented_and_lies_where_it_says(model, batch):
    names = [name.replace("{l}", "1") for name in probe.TABLE]
    assert set(names) <= set(probe.names(model))
    ends = {name.rpartition(".")[2] for name in probe.TABLE}
    short = {end.removeprefix("hook_resid") for end in ends}  # written _mid, _post there
    assert all(end in points.__doc__ for end in short), short
    _, cache = probe.run_with_cache(model, batch, names)
    text, audio = model.config.text, model.config.audio
    T, K = batch.ids.shape[1], clip_lengths(int(16000 * 0.6)).audio_tokens
    head = (1, T, text.num_attention_heads, text.head_dim)
    assert cache["blocks.1.attn.hook_q"].shape == cache["blocks.1.attn.hook_z"].shape == head
    assert cache["blocks.1.attn.hook_k"].shape == (1, T, text.num_key_value_heads, text.head_dim)
    assert cache["blocks.1.attn.hook_pattern"].shape == (1, text.num_attention_heads, T, T)
    assert cache["audio.blocks.1.attn.hook_pattern"].shape[:2] == (2, audio.encoder_attention_heads)
    assert cache["audio.ln_final.hook_normalized"].shape == (2, K, audio.d_model)
    assert cache["hook_audio_embeds"].shape == (2, K, text.hidden_size)
    # The arithmetic of a layer ties its points together.
    close = torch.testing.assert_close
    attention, mlp = cache["blocks.1.hook_attn_out"], cache["blocks.1.hook_mlp_out"]
    close(cache["blocks.1.hook_resid_mid"], cache["blocks.1.hook_resid_pre"] + attention)
    close(cache["blocks.1.hook_resid_post"], cache["blocks.1.hook_resid_mid"] + mlp)
    gate, up = cache["blocks.1.mlp.hook_pre"], cache["blocks.1.mlp.hook_pre_linear"]
    close(cache["blocks.1.mlp.hook_post"], ops.swiglu(gate, up))
    groups = text.num_attention_heads // text.num_key_value_heads
    values = cache["blocks.1.attn.hook_v"].repeat_interleave(groups, 2)
    z = torch.einsum("bhts,bshc->bthc", cache["blocks.1.attn.hook_pattern"], values)
    close(cache["blocks.1.attn.hook_z"], z)
    middle = cache["audio.blocks.1.hook_resid_mid"]
    close(cache["audio.blocks.1.hook_resid_post"], middle + cache["audio.blocks.1.hook_mlp_out"])
    assert torch.equal(cache["resid_post", 1], cache["blocks.1.hook_resid_post"])
    assert torch.equal(cache["q", 1], cache["blocks.1.attn.hook_q"])
    with pytest.raises(KeyError, match=r"blocks\.2\.hook_z was not recorded"):
        cache["z", 2]


def test_the_same_names_on_the_transformers_model(both, prompt, batch):
    ours, theirs, _ = both
    names = [
        *("audio.blocks.*.hook_resid_post", "audio.blocks.*.attn.hook_q", "hook_audio_embeds"),
        *("blocks.*.hook_resid_pre", "blocks.*.hook_resid_mid", "blocks.*.hook_attn_out"),
        *("blocks.*.attn.hook_z", "blocks.*.mlp.hook_post", "ln_final.hook_normalized"),
        *("language_model.model.layers.*.input_layernorm:in", "language_model.lm_head"),
    ]
    _, mine = probe.run_with_cache(ours, batch, names)
    lengths = [clip_lengths(len(clip)) for clip in prompt.clips]
    features = torch.zeros(2, 128, 3000)
    silence = torch.stack([row.min() for row in batch.mel])
    features += silence[:, None, None]
    mask = torch.zeros(2, 3000, dtype=torch.long)
    for i, one in enumerate(lengths):
        features[i, :, : one.input_frames] = batch.mel[i, :, : one.input_frames]
        mask[i, : one.mel_frames] = 1
    inputs = {
        "input_ids": batch.ids,
        "attention_mask": batch.attention_mask,
        "input_features": features,
        "feature_attention_mask": mask,
    }
    _, other = probe.run_with_cache(theirs, inputs, names)
    assert list(mine) == list(other) and len(mine) > 20
    for name, value in mine.items():
        expected = other[name]
        for i, one in (
            enumerate(lengths) if name.startswith(("audio", "hook_audio")) else [(0, None)]
        ):
            span = slice(None) if one is None else slice(one.conv_frames)
            if name == "hook_audio_embeds":
                span = slice(one.audio_tokens)
            torch.testing.assert_close(
                value[i, span], expected[i, span], rtol=2e-4, atol=2e-4, msg=lambda m, n=name: n + m
            )
    with pytest.raises(InputError, match="no slot for attention, so its weights cannot be seen"):
        probe.points(theirs, "blocks.*.attn.hook_pattern")


def test_only_what_is_named_stays_in_memory(model, batch):
    passed = []  # every activation of the run, as long as somebody holds it
    handles = [
        module.register_forward_hook(lambda m, a, output: passed.append(weakref.ref(output)))
        for module in model.modules()
    ]
    name = "language_model.model.layers.1"
    try:
        with torch.no_grad(), probe.record(model, name) as seen:
            logits = probe.run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    gc.collect()
    alive = [output() for output in passed if output() is not None]
    assert len(passed) > 40 and all(one is logits for one in alive)
    T, D = batch.ids.shape[1], model.config.text.hidden_size
    assert seen.bytes == seen[name].untyped_storage().nbytes() == T * D * 4
    # A few positions in half precision take that much and no more.
    with torch.no_grad(), probe.record(model, name, positions=[3, -1], dtype=torch.float16) as few:
        probe.run(model, batch)
    assert few.bytes == few[name].untyped_storage().nbytes() == 2 * D * 2
    torch.testing.assert_close(few[name].float(), seen[name][:, [3, -1]], rtol=1e-3, atol=1e-3)


def test_what_was_recorded_stays_as_it_was_and_can_carry_a_gradient(model, batch):
    with torch.inference_mode(), probe.record(model, "blocks.0.hook_resid_post") as seen:
        probe.run(model, batch)
    kept = seen["resid_post", 0]
    assert not kept.is_inference()
    kept.requires_grad_(True).sum().backward()
    with probe.record(model, "blocks.0.hook_resid_post", detach=False) as live:
        loss = probe.run(model, batch)[0, -1].sum()
    (slope,) = torch.autograd.grad(loss, live["resid_post", 0])
    assert slope.abs().max() > 0


def test_while_generating_positions_count_from_the_first_token(model, batch):
    T = batch.ids.shape[1]
    name = "blocks.2.hook_resid_post"
    with probe.record(model, name, all_calls=True) as seen:
        (answer,) = generate(model, batch, GREEDY)
    assert [x.shape[1] for x in seen.calls[name]] == [T, 1, 1, 1]
    with probe.record(model, name, positions=[T - 1, T + 1]) as some:
        generate(model, batch, GREEDY)
    whole = replace(batch, ids=torch.cat((batch.ids, torch.tensor([answer.ids])), 1))
    whole = replace(whole, attention_mask=torch.ones_like(whole.ids))
    _, once = probe.run_with_cache(model, whole, name)
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(torch.cat(seen.calls[name], 1), once[name][:, : T + 3])
    close(some[name], once[name][:, [T + 1]])  # the last call that had one


# Attention


def test_attention_maps_are_those_of_the_reference(both, folder, batch):
    transformers = pytest.importorskip("transformers")
    ours, _, _ = both
    eager = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.randint(0, 200, (1, 24), generator=torch.Generator().manual_seed(0))
    text = chat.Batch(ids, torch.ones_like(ids), None, None)
    with torch.no_grad():
        theirs = eager(input_ids=ids, output_attentions=True).attentions
        with probe.attention_maps(ours) as maps:
            probe.run(ours, text)
    drawn = probe.bertviz(maps)
    assert len(drawn) == 3 and all(one.shape == (1, 4, 24, 24) for one in drawn)
    for mine, other in zip(drawn, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_only_the_named_layers_are_swapped_and_all_are_put_back(model, batch):
    layers = model.language_model.model.layers
    expected = logits_of(model, batch)
    with torch.no_grad(), probe.attention_maps(model, "language_model.model.layers.1") as maps:
        held = [layer.self_attn.attention_op for layer in layers]
        assert held[0] is held[2] is ops.sdpa and held[1] is not ops.sdpa
        seen = probe.run(model, batch)
    assert list(maps) == ["language_model.model.layers.1.self_attn:pattern"]
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="mine"), probe.attention_maps(model):
        raise RuntimeError("mine")
    assert all(layer.self_attn.attention_op is ops.sdpa for layer in layers)
    with backends.use(model, attention="eager"), torch.no_grad():
        eager = probe.run(model, batch)
        with probe.attention_maps(model, "language_model.model.layers.*", positions=[-1]) as last:
            assert torch.equal(probe.run(model, batch), eager)  # the same arithmetic to the bit
        assert layers[0].self_attn.attention_op is ops.attention
    T = batch.ids.shape[1]
    assert all(x.shape == (1, 4, 1, T) for x in last.values())
    name = "language_model.model.layers.1.self_attn:pattern"
    torch.testing.assert_close(last[name], maps[name][:, :, -1:], rtol=1e-4, atol=1e-5)


# Reaching in


def test_patching_the_clean_run_into_another_gives_the_clean_answer(both, model, batch):
    other = chat.collate([prompt_of(both[2], noise(0.6, 8), noise(0.4, 9))], 0)
    clean, cache = probe.run_with_cache(model, batch, "blocks.0-1.hook_resid_pre")
    corrupted = logits_of(model, other)
    assert (clean - corrupted).abs().max() > 0.01
    name = "blocks.1.hook_resid_pre"
    with probe.patch(model, name, cache[name]):
        assert torch.equal(logits_of(model, other), clean)
    assert torch.equal(logits_of(model, other), corrupted)
    # The clips are all that differs, so their positions are all that must be put back.
    first = "blocks.0.hook_resid_pre"
    layout = Layout.of(batch.ids[0].tolist(), both[2])
    with probe.patch(model, first, cache[first], positions=layout.columns("audio")):
        assert torch.equal(logits_of(model, other), clean)
    with probe.patch(model, first, cache[first], positions=layout.columns("text")):
        assert torch.equal(logits_of(model, other), corrupted)
    with (
        pytest.raises(InputError, match="the value given is"),
        probe.patch(model, name, torch.zeros(1, 3, 5)),
    ):
        logits_of(model, other)


def test_ablated_heads_are_columns_of_the_output_projection(model, batch):
    attention = model.language_model.model.layers[1].self_attn
    with probe.ablate(model, "blocks.1.attn.hook_z", heads=[1, 3]):
        found = logits_of(model, batch)
    weight = attention.o_proj.weight.data
    kept = weight.clone()
    try:
        for head in (1, 3):
            weight[:, head * attention.head_dim : (head + 1) * attention.head_dim] = 0
        torch.testing.assert_close(found, logits_of(model, batch), rtol=1e-5, atol=1e-5)
    finally:
        weight.copy_(kept)
    assert (found - logits_of(model, batch)).abs().max() > 1e-3
    with probe.ablate(model, "blocks.1.attn.hook_pattern", heads=[1, 3]):
        torch.testing.assert_close(found, logits_of(model, batch), rtol=1e-5, atol=1e-5)
    with (
        pytest.raises(InputError, match="has no heads"),
        probe.ablate(model, "blocks.1.hook_mlp_out", heads=[0]),
    ):
        pass
    with (
        pytest.raises(InputError, match="would look at later"),
        probe.ablate(model, "blocks.1.attn.hook_pattern", mean=True),
    ):
        pass


def test_ablation_by_the_mean_at_some_positions(model, batch):
    seen = {}

    def keep(x, point):
        seen["mlp"] = x.clone()

    with (
        probe.ablate(model, "blocks.0.hook_mlp_out", positions=slice(2, 4), mean=True),
        probe.hooks(model, {"blocks.0.hook_mlp_out": keep}),  # it sees what the first left
    ):
        logits_of(model, batch)
    _, plain = probe.run_with_cache(model, batch, "blocks.0.hook_mlp_out")
    expected = plain["mlp_out", 0].clone()
    expected[:, 2:4] = expected.mean(1, keepdim=True)
    assert torch.equal(seen["mlp"], expected)


def test_steering_adds_a_vector_also_to_every_new_token(model, batch):
    vector = torch.randn(model.config.text.hidden_size, generator=torch.Generator().manual_seed(0))
    _, plain = probe.run_with_cache(model, batch, "blocks.1.hook_resid_post")
    with probe.steer(model, "blocks.1.hook_resid_post", vector, 2.0):
        _, steered = probe.run_with_cache(model, batch, "blocks.2.hook_resid_pre")
        (answer,) = generate(model, batch, GREEDY)
    expected = plain["resid_post", 1] + 2 * vector
    torch.testing.assert_close(steered["resid_pre", 2], expected)
    # Generating with a cache is the same as steering one run over everything.
    whole = replace(batch, ids=torch.cat((batch.ids, torch.tensor([answer.ids[:-1]])), 1))
    whole = replace(whole, attention_mask=torch.ones_like(whole.ids))
    with probe.steer(model, "blocks.1.hook_resid_post", vector, 2.0):
        again = logits_of(model, whole)[0, -4:].argmax(-1).tolist()
    assert again == answer.ids
    # At the prompt's last position alone, the tokens behind it are left alone.
    T = batch.ids.shape[1]
    with (
        probe.steer(model, "blocks.1.hook_resid_post", vector, 9.0, positions=[T - 1]),
        probe.record(model, "blocks.2.hook_resid_pre", all_calls=True) as seen,
    ):
        (other,) = generate(model, batch, GREEDY)
    whole = replace(whole, ids=torch.cat((batch.ids, torch.tensor([other.ids[:-1]])), 1))
    with probe.steer(model, "blocks.1.hook_resid_post", vector, 9.0, positions=[T - 1]):
        _, once = probe.run_with_cache(model, whole, "blocks.2.hook_resid_pre")
    joined = torch.cat(seen.calls["blocks.2.hook_resid_pre"], 1)
    torch.testing.assert_close(joined, once["resid_pre", 2], rtol=1e-4, atol=1e-4)


def test_run_with_hooks_calls_functions_as_people_know_them(model, batch):
    told = []

    def look(value, hook):
        told.append((hook.name, hook.layer(), tuple(value.shape)))

    def zero(value, hook):
        return torch.zeros_like(value)

    with torch.no_grad():
        names = [("blocks.0.attn.hook_q", look), ("ln_final.hook_normalized", zero)]
        logits = probe.run_with_hooks(model, batch, fwd_hooks=names)
    text = model.config.text
    T = batch.ids.shape[1]
    assert told == [("blocks.0.attn.hook_q", 0, (1, T, text.num_attention_heads, text.head_dim))]
    assert torch.equal(logits, torch.zeros_like(logits))


# The logit lens


def test_the_lens_ends_in_the_models_own_prediction(model, batch):
    lens = probe.logit_lens(model, batch, top=3)
    chances = logits_of(model, batch).softmax(-1)
    T = batch.ids.shape[1]
    assert lens.ids.shape == lens.probabilities.shape == (4, 1, T, 3)
    torch.testing.assert_close(lens.probabilities[-1], chances.topk(3).values)
    assert torch.equal(lens.ids[-1], chances.topk(3).indices)
    _, cache = probe.run_with_cache(model, batch, ["blocks.*.hook_resid_pre"])
    language = model.language_model
    with torch.no_grad():
        for layer in range(3):
            early = language.lm_head(language.model.norm(cache["resid_pre", layer])).softmax(-1)
            torch.testing.assert_close(lens.probabilities[layer], early.topk(3).values)


def test_the_lens_at_clip_positions_and_for_chosen_tokens(both, model, batch):
    layout = Layout.of(batch.ids[0].tolist(), both[2])
    columns = layout.columns("audio 2")
    whole = probe.logit_lens(model, batch)
    some = probe.logit_lens(model, batch, columns, targets=[7] * len(columns))
    torch.testing.assert_close(some.probabilities, whole.probabilities[:, :, columns])
    chances = logits_of(model, batch).softmax(-1)
    torch.testing.assert_close(some.wanted[-1], chances[:, columns, 7])
    with pytest.raises(InputError, match=r"10 positions, but 1 targets|positions, but 1 targets"):
        probe.logit_lens(model, batch, columns, targets=[7])


def test_the_lens_is_not_taken_for_a_step_of_the_model(model, batch):
    with torch.no_grad(), probe.record(model, "ln_final.hook_normalized", all_calls=True) as seen:
        probe.logit_lens(model, batch)
    assert len(seen.calls["ln_final.hook_normalized"]) == 1


# Where nothing can be seen


def test_the_engine_cannot_be_looked_into_and_it_is_said(model, both, prompt):
    with Engine(model, max_batch=1, max_tokens=128, worker=False) as engine:
        with probe.record(model, "blocks.1.hook_mlp_out") as seen:
            engine.submit(prompt, GREEDY).result()
        with pytest.raises(InputError, match="The Engine, and") as caught:
            seen["mlp_out", 1]
        assert "\n" not in str(caught.value)
        with probe.attention_maps(model) as maps:
            engine.submit(prompt, GREEDY).result()
        with pytest.raises(InputError, match="no tensor passed"):
            probe.bertviz(maps)
        # A change that never happened must not pass for one that made no difference.
        with (
            pytest.raises(InputError, match="no tensor passed"),
            probe.ablate(model, "blocks.1.hook_mlp_out"),
        ):
            engine.submit(prompt, GREEDY).result()


def test_a_compiled_model_cannot_be_looked_into(model):
    with (
        pytest.raises(InputError, match="is compiled"),
        probe.record(torch.compile(model), "blocks.0.hook_mlp_out"),
    ):
        pass


def test_positions_as_a_mask_or_a_number(model, batch):
    name = "blocks.0.hook_resid_pre"
    named = batch.ids[0] == batch.ids[0, 2]
    numbers = named.nonzero()[:, 0].tolist()
    _, expected = probe.run_with_cache(model, batch, name, positions=numbers)
    for mask in (named, named.tolist(), torch.tensor(numbers)):
        _, found = probe.run_with_cache(model, batch, name, positions=mask)
        assert torch.equal(found[name], expected[name])
    _, last = probe.run_with_cache(model, batch, name, positions=-1)
    _, listed = probe.run_with_cache(model, batch, name, positions=[-1])
    assert torch.equal(last[name], listed[name])


def test_weights_of_an_attention_of_your_own_are_not_invented(model, batch):
    def mine(q, k, v, causal=False, key_start=None, key_end=None):
        return ops.attention(q, k, v, causal, key_start, key_end) * 2

    with (
        backends.use(model, attention=mine),
        pytest.raises(InputError, match="of your own"),
        probe.attention_maps(model),
    ):
        pass
