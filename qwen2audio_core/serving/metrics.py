"""What a server counts, in the form that Prometheus reads."""

from qwen2audio_core.engine import Engine, Request

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
FINE = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1)


class Metrics:
    """Counters of one server. All methods may be called from any thread."""

    def __init__(self, engine: Engine):
        from prometheus_client import (
            CollectorRegistry,
            Counter,
            Gauge,
            Histogram,
            ProcessCollector,
        )

        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory, open files, processor time

        def name(text: str) -> str:
            return f"qwen2audio_{text}"

        def count(text: str, about: str, *labels: str) -> Counter:
            return Counter(name(text), about, labels, registry=registry)

        def spread(text: str, about: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name(text), about, labels, registry=registry, buckets=buckets)

        self._requests = count("requests", "Requests by their HTTP status.", "endpoint", "status")
        self._seconds = spread(
            "request_seconds", "From the head of a request to its last byte.", SECONDS, "endpoint"
        )
        self._answers = count("answers", "Answers by why they ended.", "finish_reason")
        self._prompt = count("prompt_tokens", "Tokens of prompts, of audio among them.")
        self._audio = count("audio_tokens", "Tokens of audio in prompts.")
        self._reused = count("cached_prompt_tokens", "Tokens of prompts from the prefix cache.")
        self._written = count("completion_tokens", "Tokens written.")
        self._heard = count("audio_seconds", "Seconds of sound decoded.")
        self._wait = spread("queue_seconds", "From the queue to a slot.", SECONDS)
        self._first = spread("first_token_seconds", "From the queue to the first token.", SECONDS)
        self._each = spread("token_seconds", "Between two tokens of an answer, on average.", FINE)

        self.open_requests = Gauge(
            name("open_requests"), "Requests received and not yet answered.", registry=registry
        )
        for text, about, value in (
            ("slots", "Answers that can be written at a time.", lambda: engine.max_batch),
            ("slots_busy", "Answers being written.", lambda: engine.active),
            ("queue", "Answers waiting for a slot.", lambda: engine.waiting),
            ("up", "1 while the engine runs.", lambda: engine.open),
            ("prefix_cache_bytes", "Held by the prefix cache.", lambda: engine.prefixes.bytes),
            ("prefix_cache_limit_bytes", "What it may hold.", lambda: engine.prefixes.limit),
            ("prefix_cache_entries", "Conversations in it.", lambda: len(engine.prefixes)),
        ):
            Gauge(name(text), about, registry=registry).set_function(value)

    def text(self) -> tuple[bytes, str]:
        """The page for Prometheus and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def sound(self, seconds: float) -> None:
        self._heard.inc(seconds)

    def prompt(self, tokens: int, audio_tokens: int) -> None:
        self._prompt.inc(tokens)
        self._audio.inc(audio_tokens)

    def answer(self, request: Request) -> None:
        """An answer has ended."""
        self._answers.labels(request.finish_reason).inc()
        self._reused.inc(request.reused)
        written = len(request.ids)
        self._written.inc(written)
        seconds = request.seconds
        if not written:
            return
        self._wait.observe(seconds["wait"])
        self._first.observe(seconds["wait"] + seconds["prefill"])
        if written > 1:
            self._each.observe(seconds["decode"] / (written - 1))
