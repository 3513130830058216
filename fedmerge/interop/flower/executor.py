"""Flower's simulation engine as an executor: each call is a message to a ClientApp, its result is the reply."""

from __future__ import annotations

import hmac
import logging
import os
import secrets
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

# Nobody is told of our users' simulations; flwr and Ray read these when they are imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Else Ray warns everybody who asks for no accelerators.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from ray import cloudpickle

from fedmerge.errors import ResourceError

POLL_S = 0.005
TAG_BYTES = 32
RAY_OPTIONS: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}


class FlowerExecutor(Executor):
    """Runs calls in `num_nodes` of Flower's virtual SuperNodes, as many at a time as the machine has room for.

    Each takes `num_cpus` and `num_gpus` of it, which may be fractions. Calls and results travel pickled in Flower's
    messages, under a key that only this process and the workers it started have, so that nothing else is unpickled.
    """

    def __init__(self, num_nodes: int, *, num_cpus: float = 1.0, num_gpus: float = 0.0) -> None:
        self._num_nodes = num_nodes
        self._resources: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        self._key = secrets.token_bytes(TAG_BYTES)
        # None ends it.
        self._calls: SimpleQueue[tuple[Future[Any], bytes] | None] = SimpleQueue()
        self._waiting: dict[str, Future[Any]] = {}
        self._has_ended = False
        self._failure: ResourceError | None = None
        self._thread = Thread(target=self._run, name="flower", daemon=True)
        self._thread.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Have `fn(*args, **kwargs)` called; both have to be known to the workers, which import them by name."""
        future: Future[Any] = Future()
        self._calls.put((future, _seal(self._key, (fn, args, kwargs))))
        if self._has_ended:
            self._fail()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Stop Flower, once it has done what it was given."""
        self._calls.put(None)
        if wait:
            self._thread.join()

    def _run(self) -> None:
        log, complaints = logging.getLogger("flwr"), _Complaints()
        level = log.level
        log.setLevel(logging.ERROR)
        log.addFilter(complaints)
        try:
            server_app = ServerApp()
            server_app.main()(self._serve)
            run_simulation(
                server_app,
                _make_client_app(self._key),
                self._num_nodes,
                backend_config={"client_resources": self._resources, "init_args": RAY_OPTIONS},
            )
        except BaseException as err:
            self._failure = ResourceError(f"Flower's simulation engine stopped: {complaints.first or err}")
        finally:
            log.removeFilter(complaints)
            log.setLevel(level)
            self._has_ended = True
            self._fail()

    def _serve(self, grid: Grid, context: Context) -> None:
        """Pass calls on and replies back, from within Flower's ServerApp."""
        nodes: list[int] = []
        num_sent, is_open = 0, True
        while is_open or self._waiting:
            try:
                call = self._calls.get(timeout=POLL_S)
                if call is None:
                    is_open = False
                else:
                    while len(nodes) < self._num_nodes:  # they connect one after the other
                        nodes = sorted(grid.get_node_ids())
                    future, sealed = call
                    content = RecordDict({"call": ConfigRecord({"sealed": sealed})})
                    message = Message(content, dst_node_id=nodes[num_sent % len(nodes)], message_type="query")
                    (message_id,) = grid.push_messages([message])
                    self._waiting[message_id] = future
                    num_sent += 1
            except Empty:
                pass
            for reply in grid.pull_messages(list(self._waiting)) if self._waiting else ():
                self._take(reply)

    def _take(self, reply: Message) -> None:
        future = self._waiting.pop(reply.metadata.reply_to_message_id)
        if reply.has_error():
            future.set_exception(ResourceError(f"a ClientApp failed: {reply.error.reason}"))
            return
        result, error = _unseal(self._key, reply.content)
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def _fail(self) -> None:
        """Have nobody wait for an engine that has ended."""
        failure = self._failure or ResourceError("Flower's simulation engine was stopped")
        while not self._calls.empty():
            call = self._calls.get()
            if call is not None:
                call[0].set_exception(failure)
        for message_id in list(self._waiting):
            self._waiting.pop(message_id).set_exception(failure)


class _Complaints(logging.Filter):
    """Keeps the first that Flower logs, which says more than what it raises, and shows none: they are tracebacks."""

    first: str | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        self.first = self.first or record.getMessage()
        return False


def _make_client_app(key: bytes) -> ClientApp:
    app = ClientApp()

    @app.query()
    def answer(message: Message, context: Context) -> Message:
        function, args, kwargs = _unseal(key, message.content)
        outcome: tuple[Any, Exception | None]
        try:
            outcome = function(*args, **kwargs), None
        except Exception as err:  # raised again by whoever waits for the result
            outcome = None, err
        return Message(RecordDict({"call": ConfigRecord({"sealed": _seal(key, outcome)})}), reply_to=message)

    return app


def _seal(key: bytes, value: object) -> bytes:
    data: bytes = cloudpickle.dumps(value)  # type: ignore[no-untyped-call]
    return hmac.digest(key, data, "sha256") + data


def _unseal(key: bytes, content: RecordDict) -> Any:
    sealed = content.config_records["call"]["sealed"]
    assert isinstance(sealed, bytes)
    tag, data = sealed[:TAG_BYTES], sealed[TAG_BYTES:]
    if not hmac.compare_digest(tag, hmac.digest(key, data, "sha256")):
        raise ResourceError("a message of Flower's was not made by this process or its workers")
    return cloudpickle.loads(data)
