"""The thread that owns the model: it lets requests into the batch, runs it, and knows whether that goes well."""

import logging
import threading
import time
from collections import deque
from concurrent.futures import Future

from serving.server.onnx.continuous_batch import BatchRequest, OnnxBatch

_LOG = logging.getLogger("uvicorn.error")
# A step runs at most 256 tokens of a prompt and one of each answer. A server that takes longer serves nobody.
_STUCK_S = 120.0
_MOST_FAILURES = 3  # in a row
_STOP_S = 10.0
# Whoever asks whether the engine gives tokens is told of one that is no older: asking often costs answers nothing.
_PROBE_AGE_S = 1.0


class BatchThread(threading.Thread):
    """Runs the batch while there is anything in it. Its methods may be called from any thread."""

    def __init__(self, batch: OnnxBatch) -> None:
        """Takes a batch that nobody else runs."""
        super().__init__(name="batch", daemon=True)
        self._batch = batch
        self._wake = threading.Condition()
        self._waiting: deque[BatchRequest] = deque()
        self._probe: Future[None] | None = None
        self._probed_at = -_PROBE_AGE_S
        self._stepping_since: float | None = None
        self._ending = False

    @property
    def num_waiting(self) -> int:
        """Requests without a row."""
        return len(self._waiting)

    def submit(self, request: BatchRequest) -> None:
        """Gives a request a row as soon as there is one, and memory; the first to come is the first to go."""
        with self._wake:
            self._waiting.append(request)
            self._wake.notify()

    def ask_for_token(self) -> "Future[None]":
        """Has the engine give a token between two steps of the batch; who asks meanwhile gets the same answer."""
        with self._wake:
            if self._probe is None:
                asked: Future[None] = Future()
                if time.monotonic() - self._probed_at < _PROBE_AGE_S and not self._batch.failures:
                    asked.set_result(None)
                    return asked
                self._probe = asked
                self._wake.notify()
            return self._probe

    def standstill(self) -> str | None:
        """Why nothing moves, if so; waits for nothing."""
        since = self._stepping_since
        if not self.is_alive():
            return "The thread that runs the model has ended."
        if since is not None and time.monotonic() - since > _STUCK_S:
            return f"The engine has been at one step for more than {_STUCK_S:g} s."
        return None

    def problem(self) -> str | None:
        """Why no answers can be expected of this process, if so; waits for nothing."""
        if self._batch.failures >= _MOST_FAILURES:
            return f"The engine failed {self._batch.failures} times in a row."
        return self.standstill()

    def stop(self) -> None:
        """Ends the thread after the step that it is at, or with the process if that takes long."""
        with self._wake:
            self._ending = True
            self._wake.notify()
        self.join(timeout=_STOP_S)

    def run(self) -> None:
        """See the class."""
        while True:
            with self._wake:
                while not (self._ending or self._probe or self._waiting or not self._batch.is_empty):
                    self._wake.wait()
                if self._ending:
                    return
            self._stepping_since = time.monotonic()
            try:
                self._let_in()
                self._answer_probe()
                self._batch.step()
            except Exception as error:  # whatever it is, the next requests may go well
                _LOG.error("A step of the batch failed.", exc_info=error)
                self._batch.fail(error)
            finally:
                self._stepping_since = None

    def _let_in(self) -> None:
        with self._wake:
            self._waiting = deque(request for request in self._waiting if not request.cancelled)
            while self._waiting and self._batch.fits(self._waiting[0]):
                self._batch.join(self._waiting.popleft())

    def _answer_probe(self) -> None:
        with self._wake:
            probe, self._probe = self._probe, None
        if probe is None:
            return
        try:
            self._batch.probe()
        except Exception as error:
            _LOG.error("The engine failed to give a token.", exc_info=error)
            probe.set_exception(error)
        else:
            self._probed_at = time.monotonic()
            probe.set_result(None)
