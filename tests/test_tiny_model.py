"""The small trained model that ships with the package: its files, and what it hears."""

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from oracle import load_both

import qwen2audio_core as qa
from qwen2audio_core import tiny
from qwen2audio_core.assistant import Assistant
from qwen2audio_core.model import Qwen2Audio

CLIPS = tiny.trained().parent / "clips"
FRAME = "<|audio_bos|><|AUDIO|><|audio_eos|>"


@pytest.fixture(scope="module")
def assistant() -> Iterator[Assistant]:
    yield qa.load("tiny", device="cpu", dtype=torch.float32)


def clip(name: str) -> str:
    return str(CLIPS / f"{name}.flac")


def test_its_files_are_small_and_complete() -> None:
    folder = tiny.trained()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 20e6
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "MODEL_CARD.md"}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_which_of_the_small_models_it_is(assistant: Assistant) -> None:
    assert tiny.which(assistant.model) == "tiny"
    assert tiny.which(qa.load("tiny", device="cpu", quantize="int4").model) == "tiny"
    assert tiny.which(qa.load("random", device="cpu", dtype=torch.bfloat16).model) == "random"
    torch.manual_seed(0)
    assert tiny.which(Qwen2Audio(assistant.model.config)) == ""  # of its shape, and another
    assert tiny.which(Qwen2Audio(replace(tiny.TINY, audio_token_id=7))) == ""


QUESTIONS = [  # clip, question; None lets the clip ask
    ("en_capital", None),
    ("en_train", "What does the person say?"),
    ("fr_book", "Which language is this?"),
    ("zh_weather", "Translate this into English."),
    ("sound_bell", "What is that sound?"),
    ("de_coffee", "Is the speaker a man or a woman?"),
]


def test_transformers_loads_it_and_writes_the_same(assistant: Assistant) -> None:
    # Text against text, through the reference's own processor and generate, in one padded batch.
    transformers = pytest.importorskip("transformers")
    folder = tiny.trained()
    _, reference = load_both(folder, torch.float32)
    processor = transformers.Qwen2AudioProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    turns = [qa.assistant.user_turn(text, clip(name)) for name, text in QUESTIONS]
    ours = [reply for (reply,) in assistant.batch([[turn] for turn in turns], max_new_tokens=32)]
    waveforms = [reply.prompt.clips[0].numpy() for reply in ours]
    texts = []
    for _, text in QUESTIONS:
        content = [{"type": "audio", "audio_url": "clip"}]
        content += [{"type": "text", "text": text}] if text else []
        conversation = [{"role": "user", "content": content}]
        texts.append(
            processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        )
    inputs = processor(
        text=texts, audio=waveforms, sampling_rate=16_000, return_tensors="pt", padding=True
    )
    for row, reply in zip(inputs.input_ids.tolist(), ours, strict=True):
        assert row[len(row) - len(reply.prompt.ids) :] == reply.prompt.ids
    with torch.no_grad():
        written = reference.generate(**inputs, max_new_tokens=32, do_sample=False)
    theirs = processor.batch_decode(
        written[:, inputs.input_ids.shape[1] :],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    assert theirs == [reply.text for reply in ours]
    assert all(theirs) and len(set(theirs)) == len(theirs)  # it has something to say to each


def test_turns_about_several_clips(assistant: Assistant) -> None:
    """Each answer is about its own turn's clip, whatever came before."""
    turns = [
        ("it_sea", "What does the person say?", "Domani andiamo al mare."),
        ("sound_bell", "What is that sound?", "A bell is ringing."),
        ("en_capital", None, "Paris."),
        ("fr_book", "Which language is this?", "French."),
    ]
    for order in (turns, turns[::-1]):
        talk = assistant.chat()
        for clip, question, answer in order:
            reply = talk.say(question, CLIPS / f"{clip}.flac", greedy=True, max_new_tokens=24)
            assert reply.text == answer, clip
