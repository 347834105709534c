"""What a user does, on a device and on the CPU: python tests/on_a_device.py DEVICE [FLOW ...]

DEVICE is a real one, cuda or mps, or a pretended one, "pretend:cuda" or "pretend:other". Prints one
JSON object a line for each flow: {"flow", "there", "here"}, or {"flow", "error"}. The test is
test_devices.py.
"""

import contextlib
import io
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent), str(TESTS.parent / "kernels")]

import pretend_device  # noqa: E402
import tape  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from qwen2audio_core import assistant, engine, ops, probe, recording, slots, transcribe  # noqa: E402
from qwen2audio_core import chat as chats  # noqa: E402

CLIPS = TESTS.parent / "qwen2audio_core" / "assets" / "clips"


def chirp(samples: int) -> tuple[Tensor, int]:
    return 0.3 * torch.sin(3000 * (torch.arange(samples) / 16_000) ** 2), 16_000


if find_spec("soundfile"):
    CLIP, OTHER_CLIP, SOUND = (
        str(CLIPS / f"{name}.flac") for name in ("de_coffee", "zh_weather", "sound_bell")
    )
else:  # what is heard does not matter
    CLIP, OTHER_CLIP, SOUND = chirp(30_000), chirp(20_000), chirp(16_000)


@cache
def loaded(device: str, model: str = "tiny", **options: Any) -> assistant.Assistant:
    made = assistant.load(model, device=device, dtype=torch.float32, **options)
    if made.device.type == "cuda":  # gpu.py
        assert not torch.backends.cuda.cudnn_sdp_enabled() and not torch.backends.cudnn.allow_tf32
    return made


def quick() -> str:
    """The smaller model where kernels are interpreted; its words are near ties, so ask for few."""
    return "random" if pretended else "tiny"


def numbers(values: Tensor) -> Any:
    return values.detach().float().cpu().tolist()


def turns(*clips: Any) -> list[dict[str, Any]]:
    return [assistant.user_turn(None if clips else "Who are you?", list(clips))]


# --- answers --------------------------------------------------------------------------------------


def answers(device: str) -> Any:
    """A batch of unequal rows with several answers to each, and one with its likelihoods."""
    model = loaded(device)
    asked = [turns(CLIP), turns(OTHER_CLIP, SOUND)]
    rows = model.batch(asked, answers=2, greedy=True)
    drawn = model.batch(asked, answers=2, temperature=1.5, seed=1, max_new_tokens=8)
    assert len({str(reply) for row in drawn for reply in row}) > 2
    reply = model.ask("What is said?", CLIP, logprobs=2)
    said = [[str(reply) for reply in row] for row in rows]
    return said, str(reply), [one.logprob for one in reply.logprobs]


def conversation(device: str) -> Any:
    """Two turns, the clip a tensor that lies on the device."""
    chat = loaded(device).chat()
    clip = chirp(30_000)[0].to(device)
    return str(chat.say(audio=(clip, 16_000))), str(chat.say("And now?", SOUND))


def transcript(device: str) -> Any:
    found = transcribe.transcribe(loaded(device), CLIP, words=True)
    return [(word.text, word.start, word.end) for s in found.segments for word in s.words or ()]


def codes(device: str) -> Any:
    """int8 and int4, made on the device; on a GPU by the kernel `linear`."""
    return [
        loaded(device, quick(), quantize=name).ask("What?", CLIP, max_new_tokens=3, greedy=True).ids
        for name in ("int8", "int4")
    ]


def readme(device: str) -> Any:
    """All the README shows in Python, on a machine whose best device is this one."""
    text = (TESTS.parent / "README.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(patch.object(assistant, "pick_device", lambda _=None: torch.device(device)))
        if pretended:  # its kernels take too long on the trained model
            enter(patch.object(engine, "_kernels", lambda *_: None))
        out = enter(contextlib.redirect_stdout(io.StringIO()))
        for block in text.split("```python\n")[1:]:
            exec(block.split("```")[0], names)
    assert names["logits"].device == torch.device(device)
    said = out.getvalue().splitlines()
    return said[:4], len(said), int(names["logits"][0, -1].argmax())  # what follows is drawn


# --- the engine -----------------------------------------------------------------------------------


def with_engine(model: assistant.Assistant, clip: Any = None, **options: Any) -> list[list[int]]:
    """Three conversations in two slots."""
    prompts = [model.encode(turns(*clips)) for clips in ([clip] if clip else [], [], [])]
    settings = assistant.change(model.settings, greedy=True, max_new_tokens=3)
    with engine.Engine(model.model, max_batch=2, max_tokens=300, worker=False, **options) as made:
        assert (made.slots.recordings is not None) == (options["backend"] == "triton")
        return [answer.ids for answer in made.generate(prompts, settings)]


def plain_engine(device: str) -> Any:
    return with_engine(loaded(device), chirp(4000), backend="torch")


def engine_on_kernels(device: str) -> Any:
    """Every op a kernel, every step a graph."""
    backend = "torch" if device == "cpu" else "triton"
    return with_engine(loaded(device, quick()), chirp(4000), backend=backend)


def engine_on_codes(device: str) -> Any:
    """The same with int4 weights, keys and values in int8."""
    backend = "torch" if device == "cpu" else "triton"
    return with_engine(loaded(device, quick(), quantize="int4"), backend=backend, int8_cache=True)


# --- a look inside, and training ------------------------------------------------------------------


def inside(device: str) -> Any:
    """Attention, lens, and what a gradient, an attention rollout and silence attribute."""
    from qwen2audio_core.inspection import collect

    found = collect.inspect(loaded(device), SOUND, max_new_tokens=4)
    lens = [[word for word, _ in row] for row in found.lens[-1]]
    return found.answer, lens, [one.peak() for one in found.attributions.values()]


def changed(device: str) -> Any:
    """Values from the CPU put into the run of a model that is elsewhere."""
    model = loaded(device)
    batch = chats.collate([model.encode(turns(CLIP))], 0, device=device)
    vector = torch.ones(model.model.config.text.hidden_size)
    name = "blocks.1.hook_resid_post"
    found = []
    for change in (
        probe.steer(model.model, name, vector, 0.5),
        probe.patch(model.model, name, vector[None, None], positions=[1, 2]),
        probe.ablate(model.model, "blocks.1.attn.hook_z", heads=[0]),
    ):
        with torch.inference_mode(), change:
            found.append(numbers(probe.run(model.model, batch)[0, -1, :5]))
    return found


def trained(device: str) -> Any:
    """Each stage for some steps, looking at held-out rows, broken off and gone on."""
    from dataclasses import replace

    from training_rows import chat_row, checkpoint, official_rows, settings, tone, write_lines

    from qwen2audio_core.training import loop, lora, parallel

    losses = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = checkpoint(folder / "base")
        rows = write_lines(folder / "rows.jsonl", official_rows(folder, 6))
        pair = chat_row([tone(folder / "p.wav", 300, 0.4)], ["Good."], rejected_response="Bad.")
        pairs = write_lines(folder / "pairs.jsonl", [{**pair, "seconds": 0.4}] * 2)
        runs: dict[str, Any] = {
            "whole": {
                "data": rows,
                "ctc_weight": 0.3,
                "valid": rows,
                "samples": 1,
                "eval_every": 2,
            },
            "adapter": {"data": rows, "stage": "sft", "adapter": lora.Settings(rank=2)},
            "pairs": {"data": pairs, "stage": "dpo"},
        }
        for name, more in runs.items():
            data = more.pop("data")
            chosen = settings(base, [data], folder / name, device=device, **more)
            for steps in (2, 3):
                chosen = replace(chosen, steps=steps)
                run = loop.Run(chosen, parallel.start(device), loop.read_rows(chosen))
                run.go()
            lines = (folder / name / "log.jsonl").read_text().splitlines()
            found = [json.loads(line).get("loss") for line in lines]
            losses.append([loss for loss in found if loss is not None])
    return losses


# --- mistakes that nothing shows on a CPU ---------------------------------------------------------


def angles_on_the_cpu(device: str) -> Any:
    tables = ops.rope_tables
    with patch.object(ops, "rope_tables", lambda at, *more: tables(at.cpu(), *more)):
        return answers(device)


def a_step_that_waits(device: str) -> Any:
    append = slots.Slots._append

    def waiting(self: slots.Slots, logits: Tensor, rows: slice) -> None:
        if bool(logits.isfinite().all()):
            append(self, logits, rows)

    with patch.object(slots.Slots, "_append", waiting):
        return one_step(device)


def a_step_that_asks_the_host(device: str) -> Any:
    append = slots.Slots._append

    def asking(self: slots.Slots, logits: Tensor, rows: slice) -> None:
        append(self, logits + torch.zeros(logits.shape).to(logits.device), rows)

    with patch.object(slots.Slots, "_append", asking):
        return one_step(device)


def one_step(device: str) -> Any:
    with patch.object(slots, "LONGEST_PROMPT", 0):  # for which it does not matter
        return with_engine(loaded(device, quick()), backend="triton")


MISTAKES = (angles_on_the_cpu, a_step_that_waits, a_step_that_asks_the_host)

ANYWHERE = (readme, answers, conversation, transcript, codes, plain_engine, changed)
KERNELS = (engine_on_kernels, engine_on_codes)
GRADIENTS = (inside, trained)
FLOWS = {
    "pretend:cuda": (*ANYWHERE, *KERNELS),
    "pretend:other": (*ANYWHERE[1:], *GRADIENTS),
    "cuda": (*ANYWHERE, *KERNELS, *GRADIENTS),
    "mps": (*ANYWHERE, *GRADIENTS),
}
pretended = False


def main(device: str, names: list[str]) -> None:
    global pretended
    torch.set_num_threads(1)  # two wait for each other longer than this takes
    flows: Sequence[Callable[[str], Any]] = FLOWS[device]
    if device == "pretend:cuda":
        flows = (*flows, *MISTAKES)
    if device.startswith("pretend:"):
        pretended = True
        import interpreter  # noqa: F401

        device = str(pretend_device.begin(device.removeprefix("pretend:")))
        assistant.pick_device = torch.device  # which knows cpu, cuda and mps alone
        engine.record_graph = lambda device: partial(tape.record, warm=False)
        recording.UNIT = 16  # what is computed and read by nobody is interpreted too
    for flow in flows:
        if names and flow.__name__ not in names:
            continue
        said: dict[str, Any] = {"flow": flow.__name__}
        try:
            said |= {"there": flow(device), "here": flow("cpu")}
        except Exception:
            said["error"] = traceback.format_exc()
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
