"""The one thread that runs the model, and the line of those who wait for it.

The work is done in a thread of its own, not where its caller watches it, so that a caller that
vanishes cannot hold the model: stopping a job frees it at the next token.
"""

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable

from qwen2audio_core.errors import InputError
from qwen2audio_core.terminal import memory_line


class Job:
    """A piece of work in the line. The work itself asks `stopped` between its steps.

    error  one line for a person where the work failed, "" otherwise
    """

    def __init__(self, work: Callable[["Job"], None]):
        self.work = work
        self.error = ""
        self._stop = threading.Event()
        self._done = threading.Event()

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    @property
    def done(self) -> bool:
        """Whether the model is through with it."""
        return self._done.is_set()

    def stop(self) -> None:
        """Leave the line, or the model at the next step."""
        self._stop.set()

    def wait(self, timeout: float | None = None) -> bool:
        return self._done.wait(timeout)


class Worker:
    """Runs jobs one at a time, in the order in which they came.

    waiting  jobs that may wait; one more is refused
    """

    def __init__(self, waiting: int = 32):
        self._waiting = waiting
        self._line: deque[Job] = deque()  # the first one is running
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[Job], None]) -> Job:
        """Put work at the end of the line. InputError if that is too long."""
        job = Job(work)
        with self._changed:
            if self._closed:
                raise InputError("the program is closing")
            if len(self._line) > self._waiting:
                raise InputError(
                    f"{self._waiting} answers are waited for already: try again in a minute"
                )
            self._line.append(job)
            self._changed.notify_all()
        return job

    def place(self, job: Job) -> int:
        """How many come before a job; 0 if it is running or over."""
        with self._changed:
            ahead = 0
            for other in self._line:
                if other is job:
                    return ahead
                ahead += not other.stopped
            return 0

    def close(self) -> None:
        """Stop what is running, forget the rest."""
        with self._changed:
            self._closed = True
            for job in self._line:
                job.stop()
            self._changed.notify_all()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._line or self._closed)
                if not self._line:
                    return
                job = self._line[0]
            try:
                if not job.stopped:
                    job.work(job)
            except InputError as error:
                job.error = str(error)
            except Exception as error:
                job.error = memory_line(error) or "something went wrong; the server's log says what"
                traceback.print_exc(file=sys.stderr)
            finally:
                with self._changed:
                    self._line.popleft()
                job._done.set()
