"""The fast way to answer: many conversations at once, joining and leaving between steps.

    with Engine(model) as engine:
        request = engine.submit(prompt, settings)      from any thread
        for token in request: ...                      as they are written
        answer = request.result()                      or all of it

generate.py is its oracle: the same tokens in float32, in bfloat16 the same up to its rounding.

packing         weights that are read together lie side by side
slots           the state of the conversations: prefill, the decode step
packed_encoder  clips end to end
recording       all that as CUDA graphs
prefix_cache    what was read before is not read again
this file       who may enter, what each one gets, and what becomes of errors

Memory is fixed when the engine is made: the slots, and the bytes of the prefix cache. Requests wait
in the order in which they came; one that can never fit is refused at once.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any

import torch

from qwen2audio_core import backends, gpu
from qwen2audio_core.chat import Prompt, check_length
from qwen2audio_core.errors import InputError, PromptError, inside
from qwen2audio_core.frontend import clip_lengths
from qwen2audio_core.generate import Answer
from qwen2audio_core.model import Qwen2Audio, check_places
from qwen2audio_core.packing import pack, pack_codes
from qwen2audio_core.prefix_cache import WORTH, Beginning, PrefixCache, digest, runs
from qwen2audio_core.recording import record_graph
from qwen2audio_core.sampling import Likelihood, Settings, check_seed, check_whole
from qwen2audio_core.slots import MAX_ENDS, MAX_TOP, Job, Slots

OnToken = Callable[[int], bool | None]
OnEnd = Callable[["Request"], None]


class Request:
    """One conversation being answered. Iterate over it for the ids, or wait for `result`.

    ids            written so far, the end token among them when the model wrote it
    logprobs       Likelihood of each id, where they were asked for
    finish_reason  "stop": an end token or the caller; "length": out of tokens; "cancelled";
                   "error", which iterating and `result` raise; "" while it runs
    reused         ids of the prompt that came from the prefix cache
    seconds        {"wait", "prefill", "decode"}, how long each took
    """

    def __init__(
        self,
        engine: "Engine",
        job: Job,
        beginning: Beginning,
        on_token: OnToken | None,
        on_end: OnEnd | None,
        top: int,
    ):
        self.ids: list[int] = []
        self.logprobs: list[Likelihood] = []
        self.finish_reason = ""
        self.error: Exception | None = None
        self.reused = 0
        self.seconds: dict[str, float] = {}
        self._engine = engine
        self._job = job
        self._clips = job.clips
        self._beginning = beginning
        self._prefixes = engine.prefixes  # where its own are kept
        self._on_token, self._on_end = on_token, on_end
        self._top = top  # alternatives to each id
        self._wanted_end = ""  # what the caller asked for
        self._news = threading.Condition()
        self._since = time.perf_counter()

    def __iter__(self) -> Iterator[int]:
        given: list[int] = []
        while True:
            self._wait(lambda: bool(len(self.ids) > len(given) or self.finish_reason))
            if len(given) == len(self.ids):
                break
            given.append(self.ids[len(given)])
            yield given[-1]
        if self.error is not None:
            raise self.error

    def result(self, timeout: float | None = None) -> Answer:
        """Wait for the end. Raises what went wrong, and TimeoutError after `timeout` seconds."""
        self._wait(lambda: bool(self.finish_reason), timeout)
        if self.error is not None:
            raise self.error
        return Answer(list(self.ids), self.finish_reason, list(self.logprobs))

    def finish(self) -> None:
        """End it here for the caller's own reason, such as a stop string: finish_reason "stop"."""
        self._engine._end(self, "stop")

    def cancel(self) -> None:
        """Nobody wants it any more: it leaves the queue now, or its slot before the next step."""
        self._engine._end(self, "cancelled")

    def _wait(self, done: Callable[[], bool], timeout: float | None = None) -> None:
        if not self._engine.has_worker:
            while not done():
                self._engine.advance()
            return
        with self._news:
            if not self._news.wait_for(done, timeout):
                raise TimeoutError(f"no answer after {timeout} s")

    def _stage(self, name: str) -> None:
        """Book the time since the last call under a stage's name."""
        now = time.perf_counter()
        self.seconds[name] = now - self._since
        self._since = now

    def _write(self, token: int) -> None:
        with self._news:
            self.ids.append(token)
            self._news.notify_all()
        if self._on_token is not None and self._on_token(token):
            self._wanted_end = "stop"

    def _close(self, reason: str, error: Exception | None = None) -> None:
        with self._news:
            self._stage("decode" if self.ids else "prefill")
            self.finish_reason, self.error = reason, error
            self._news.notify_all()
        if self._on_end is not None:
            self._on_end(self)


class Engine:
    """Answers many conversations at once with one model.

    max_batch       conversations that are written at a time; more wait
    max_tokens      prompt and answer of each. Both together fix the cache: max_batch * max_tokens
                    * 0.5 MB in the published shape and bfloat16. A CPU fills it as it is used
    prefix_bytes    what the prefix cache may hold beside the slots; 0 turns it off. `forget`
                    empties it, for when the model has changed
    prefill_tokens  read at a time while others wait for their next token
    int8_cache      keys and values in half of bfloat16's memory; slots.SlotCache has its error
    deterministic   a conversation's tokens and logits are the same bits alone and in any company.
                    On a CPU the rows take turns, so that a batch of n costs n steps of one (3.7
                    times as long for 8, measured on two cores); prompts are read one at a time, and
                    the prefix cache is off
    packed          lay weights side by side (packing.pack, which changes where the model's weights
                    live, not what they are, and stays when the engine is closed); None does it on a
                    GPU, and on a CPU with the codes of quantised layers alone (packing.pack_codes).
                    Where that puts int8 codes in order, q, k, v, gate and up take about twice their
                    time when the model runs without an engine; False leaves them as they are
    backend         "torch", "triton", or "auto": Triton where the model is on a GPU that runs it.
                    Triton also fills the model's op slots until `close`
    worker          run in a thread of its own. Without one the engine moves when a request is
                    waited for, or by `advance`, and belongs to one thread
    errors          InputError where the model or the machine does not allow what was asked for
    """

    def __init__(
        self,
        model: Qwen2Audio,
        *,
        max_batch: int = 8,
        max_tokens: int = 2048,
        prefix_bytes: int = 2**31,
        prefill_tokens: int = 2048,
        int8_cache: bool = False,
        deterministic: bool = False,
        packed: bool | None = None,
        backend: str = "auto",
        worker: bool = True,
    ):
        for name, value in (("max_batch", max_batch), ("max_tokens", max_tokens)):
            if value < 1:
                raise InputError(f"{name} is {value}, it must be at least 1")
        self.model = model
        self.config = model.config
        device = model.language_model.model.embed_tokens.weight.device
        self.max_batch = max_batch
        self.max_tokens = min(max_tokens, self.config.text.max_position_embeddings)
        self.prefill_tokens = prefill_tokens
        self.deterministic = deterministic
        kernels = _kernels(backend, device)
        self._backend = None if kernels is None else backends.use(model, "triton")
        on_gpu = device.type == "cuda"
        if on_gpu:
            gpu.settle()  # the model may have come there by itself
        self._on_device: Callable[[], AbstractContextManager[Any]] = (
            partial(torch.cuda.device, device) if on_gpu else nullcontext
        )
        try:
            if packed or (packed is None and on_gpu):
                pack(model)
            elif packed is None and kernels is None:
                pack_codes(model)
            with torch.inference_mode():
                self.slots = Slots(
                    model,
                    max_batch,
                    self.max_tokens,
                    int8_cache=int8_cache,
                    kernels=kernels,
                    deterministic=deterministic,
                    record=record_graph(device) if on_gpu and kernels is not None else None,
                )
        except BaseException:  # such as no memory for so many slots: its ops are put back
            if self._backend is not None:
                self._backend.restore()
            raise
        self.prefixes = PrefixCache(0 if deterministic else prefix_bytes)
        self._waiting: deque[Request] = deque()
        self._entering: list[Request] = []  # taken out of the queue, being read
        self._active: list[Request] = []  # of slot 0, 1, ...
        self._leaving: dict[Request, tuple[str, Exception | None]] = {}  # to be told their end
        self._changed = threading.Condition()  # guards _waiting and _closed
        self._closed = False
        self._mover: threading.Thread | None = None  # who is in `advance`
        self._thread: threading.Thread | None = None
        if worker:
            self._thread = threading.Thread(target=self._work, name="qwen2audio", daemon=True)
            self._thread.start()

    @property
    def has_worker(self) -> bool:
        return self._thread is not None

    @property
    def open(self) -> bool:
        """Whether it takes requests: neither closed nor ended by a fault of its own."""
        return not self._closed

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Slots in use."""
        return len(self._active)

    # --- from any thread --------------------------------------------------------------------------

    def submit(
        self,
        prompt: Prompt,
        settings: Settings,
        seed: int | None = None,
        on_token: OnToken | None = None,
        on_end: OnEnd | None = None,
        logprobs: int | None = None,
    ) -> Request:
        """Queue a conversation.

        seed      for sampling, independent of what else is answered; None draws one from PyTorch
        on_token  called from the engine's thread with every id; returning True ends the answer
        on_end    called once with the request when it has ended, in whatever way, from the
                  engine's thread or the one that cancelled it. It must not raise
        logprobs  also give each id's Likelihood, with so many alternatives (0 to 20)
        errors    PromptError for a prompt that is not one, InputError for one that cannot fit
        """
        job, clips = self._job(prompt, settings, seed)
        if logprobs is not None:
            logprobs = check_whole("logprobs", logprobs, 0, MAX_TOP)
        job.logprobs = logprobs is not None
        digests = [digest(clip) for clip in prompt.clips] if self.prefixes.limit else []
        beginning = Beginning(prompt.ids, list(zip([at for at, _ in clips], digests, strict=False)))
        request = Request(self, job, beginning, on_token, on_end, logprobs or 0)
        with self._changed:
            if self._closed:
                raise InputError("the engine is closed")
            self._waiting.append(request)
            self._changed.notify_all()
        return request

    def generate(
        self, prompts: Sequence[Prompt], settings: Settings, seed: int | None = None
    ) -> list[Answer]:
        """Answer prompts, each as if it were alone, with the same seed. In their order. Where one
        cannot be, none is, and the error tells its number."""
        requests: list[Request] = []
        try:
            for i, prompt in enumerate(prompts):
                try:
                    requests.append(self.submit(prompt, settings, seed))
                except InputError as error:
                    raise inside(f"prompts[{i}]", error) from error
            return [request.result() for request in requests]
        except BaseException:  # Ctrl-C too: nobody waits for the others any more
            for request in requests:
                request.cancel()
            raise

    def forget(self) -> None:
        """Empty the prefix cache, and record graphs anew. Call it when the model has changed, its
        weights or what fills its op slots: what was read with the old one would go on serving the
        new one."""
        self.prefixes = PrefixCache(self.prefixes.limit)  # what is being answered keeps to the old
        self.slots.forget()

    def warm(self) -> None:
        """Have done what the first requests would wait for (Slots.warm).

        errors   InputError where there are requests already
        """
        if self.active or self.waiting:
            raise InputError("an engine is warmed up before its first request")
        with torch.inference_mode(), self._on_device():
            self.slots.warm()

    def close(self) -> None:
        """Cancel what is left, end the thread, and give the model its op slots back. Called from
        a request's own function it returns at once, and this is done after the step."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._mover is threading.current_thread():
            return
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._shut(None)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _job(
        self, prompt: Prompt, settings: Settings, seed: int | None
    ) -> tuple[Job, list[tuple[int, int]]]:
        """Check a prompt; returns the job and the (start, length) of each clip's places."""
        text, ids = self.config.text, prompt.ids
        if not ids:
            raise PromptError("the prompt is empty")
        if min(ids) < 0 or max(ids) >= text.vocab_size:
            raise PromptError(f"the prompt holds an id outside the vocabulary of {text.vocab_size}")
        clips = runs(ids, self.config.audio_token_id)
        needed = [clip_lengths(len(clip)).audio_tokens for clip in prompt.clips]
        check_places([held for _, held in clips], needed)
        left = check_length(prompt, text.max_position_embeddings)
        budget = min(settings.max_new_tokens, left)
        if len(ids) + budget - 1 > self.max_tokens:  # the last id is never read
            raise InputError(
                f"a prompt of {len(ids)} tokens and an answer of up to {budget} exceed the engine's"
                f" {self.max_tokens}: lower max_new_tokens, or make the engine with more max_tokens"
            )
        if len(settings.eos_token_ids) > MAX_ENDS:
            count = len(settings.eos_token_ids)
            raise InputError(f"{count} end tokens were given, the engine takes up to {MAX_ENDS}")
        seed = check_seed(seed)
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        return Job(0, ids, prompt.clips, settings, budget, seed), clips

    def _end(self, request: Request, reason: str) -> None:
        with self._changed:
            waits = request in self._waiting
            if waits:
                self._waiting.remove(request)
            elif not request.finish_reason:
                request._wanted_end = reason
        if waits:
            request._close(reason)

    # --- in the engine's thread -------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting or self._active)
                if self._closed:
                    return
            self.advance()

    def advance(self) -> bool:
        """Let requests leave and join, then write one id in each. Returns whether any are left."""
        self._mover = threading.current_thread()
        try:
            with torch.inference_mode(), self._on_device():
                self._finish_where({})
                group = self._next_group()
                if group:
                    self._read(group)
                if self._active:
                    self._write()
        except Exception as error:  # a fault of the engine's own: nobody may wait forever
            with self._changed:
                self._closed = True
            self._shut(error)
            raise
        finally:
            self._mover = None
        if self._closed:
            self._shut(None)
        return bool(self._active or self._waiting)

    def _next_group(self) -> list[tuple[Request, Beginning | None]]:
        """The requests to read next, each with what is known of it already, in their order."""
        group: list[tuple[Request, Beginning | None]] = []
        free = self.max_batch - len(self._active)
        tokens, prefixes = 0, self.prefixes
        with self._changed:
            while self._waiting and len(group) < min(free, 1 if self.deterministic else free):
                request = self._waiting[0]
                known, start = prefixes.find(request._beginning)
                tokens += len(request._job.ids) - start
                if group and (tokens > self.prefill_tokens or self._worth_waiting(request, group)):
                    break
                request._job.start = request.reused = start
                request._prefixes = prefixes
                group.append((request, known))
                self._entering.append(self._waiting.popleft())
        return group

    def _worth_waiting(
        self, request: Request, group: Sequence[tuple[Request, Beginning | None]]
    ) -> bool:
        """Whether the prefix cache will have more for a request once the group has been read."""
        own = request._beginning
        _, start = self.prefixes.find(own)
        shares = (other._beginning.shared(own) for other, _ in group)
        return self.prefixes.limit > 0 and max(shares) >= start + WORTH

    def _read(self, group: Sequence[tuple[Request, Beginning | None]]) -> None:
        """Prefill requests into the next free slots, and hand out their first ids."""
        first = len(self._active)
        jobs = []
        for row, (request, _) in enumerate(group, start=first):
            request._stage("wait")
            job = request._job
            job.row = row
            places = runs(job.ids, self.config.audio_token_id)
            clips = zip(places, request._clips, strict=True)
            job.clips = [clip for (at, held), clip in clips if at + held > job.start]
            jobs.append(job)
        try:
            for job, (_, known) in zip(jobs, group, strict=True):
                if known is not None:
                    self.slots.cache.load(job.row, known.saved, job.start)
            news = self.slots.prefill(jobs)
        except Exception as error:
            for row in range(first, first + len(group)):
                self.slots.clear(row)
            if len(group) == 1:
                request = group[0][0]
                self._entering.remove(request)
                request._close("error", error)
            else:  # one of them is to blame
                for one in group:
                    self._read([one])
            return
        for row, (request, _) in enumerate(group, start=first):
            request._stage("prefill")
            self._entering.remove(request)
            self._active.append(request)
            self._keep(row, len(request._job.ids))
        self._hand_out(dict(enumerate(news, start=first)))

    def _write(self) -> None:
        """One step of all active requests."""
        try:
            news = self.slots.step(len(self._active))
        except Exception as error:
            self._finish_where(dict.fromkeys(range(len(self._active)), ("error", error)))
            return
        self._hand_out(dict(enumerate(news)))

    def _hand_out(self, news: dict[int, tuple[int, bool]]) -> None:
        """Give row -> (id, whether it is the last) to the requests of those rows."""
        ends: dict[int, tuple[str, Exception | None]] = {}
        for row, (token, ended) in news.items():
            request = self._active[row]
            failure = self.slots.failures.pop(row, None)
            try:
                if failure is not None:
                    raise failure
                if request._job.logprobs:
                    request.logprobs.append(self.slots.likelihood(row, request._top))
                request._write(token)
            except Exception as error:  # the caller's function, or this row's logits
                ends[row] = "error", error
                continue
            if ended:
                stopped = token in request._job.settings.eos_token_ids
                ends[row] = ("stop" if stopped else request._wanted_end or "length"), None
        self._finish_where(ends)

    def _finish_where(self, ends: dict[int, tuple[str, Exception | None]]) -> None:
        """End the requests of these rows, and those whose callers asked for it."""
        for row in reversed(range(len(self._active))):
            request = self._active[row]
            reason, error = ends.get(row, (request._wanted_end, None))
            if not reason:
                continue
            if error is None:
                self._keep(row, len(request._job.ids) + len(request.ids) - 1)
            self._leaving[request] = reason, error
            last = len(self._active) - 1
            if row != last:  # slots in use stay together at the front
                self.slots.move(last, row)
                self._active[row] = self._active[last]
            self._active.pop()
            self.slots.clear(last)
        while self._leaving:  # told when all slots are in order
            request = next(iter(self._leaving))
            request._close(*self._leaving.pop(request))

    def _keep(self, row: int, length: int) -> None:
        """Put the first `length` ids of a row, all of them read, into the prefix cache."""
        request = self._active[row]
        prefixes = request._prefixes
        size = self.slots.cache.bytes(length)
        if length < WORTH or size > prefixes.limit:
            return
        ids = (request._job.ids + request.ids)[:length]
        new = Beginning(ids, request._beginning.clips)
        if prefixes.holds(new):
            return
        prefixes.make_room(new, size)
        try:
            new.saved = self.slots.cache.save(row, length)
        except (RuntimeError, MemoryError):  # no memory for the copy: the answer matters more
            return
        prefixes.add(new)

    def _shut(self, error: Exception | None) -> None:
        """End every request that is left, and give the model its op slots back."""
        reason = "cancelled" if error is None else "error"
        with self._changed:
            held = (self._active, self._entering, self._waiting)
            ends = dict.fromkeys(itertools.chain(*held), (reason, error)) | self._leaving
            for requests in (*held, self._leaving):
                requests.clear()
        faults = []
        for request, end in ends.items():
            try:
                request._close(*end)
            except Exception as fault:  # an on_end that raises keeps nobody else waiting
                faults.append(fault)
        if self._backend is not None:
            self._backend.restore()
        if faults:
            raise faults[0]


def _kernels(backend: str, device: torch.device) -> Any:
    """The package of kernels, or None for plain PyTorch."""
    if backend not in ("auto", "torch", "triton"):
        raise InputError(f"backend is {backend!r}, choose 'auto', 'torch' or 'triton'")
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return None
    return backends.triton_kernels() if backend == "triton" else backends.find_kernels()[0]
