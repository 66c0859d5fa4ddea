"""The one place that runs onnxruntime: in a child process, so that its crash is a verdict and not ours."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from onnx import NodeProto

from onnxslim_lab.errors import DataError, ParameterError, SessionError, one_line, quote, suggest
from onnxslim_lab.graph import Graph
from onnxslim_lab.metrics import compare_outputs
from onnxslim_lab.worker.child import Child, ChildError, Session
from onnxslim_lab.worker.files import ModelFile, weight_bytes
from onnxslim_lab.worker.messages import Value

Optimization = Literal["off", "basic", "extended", "layout", "all"]

_LEVELS: dict[str, str] = {
    "off": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "layout": "ORT_ENABLE_LAYOUT",
    "all": "ORT_ENABLE_ALL",
}
_MEMORY_FACTOR = 2.5  # a session holds the file's weights, their prepacked copy and activations
_CACHED = 4  # sessions and model files kept


class SessionTooLarge(SessionError):  # noqa: N818 - a kind of SessionError, named for what is wrong
    """A session of this model would not fit the memory budget; nothing was started."""


class Runner:
    """Runs models on onnxruntime in a child process, started when first needed.

    The child has telemetry off and runs in a private temporary folder, where models are saved for it;
    sessions are kept, so that running the same graph again loads nothing. After a crash or a timeout the
    next call starts a new child. Data in float32 is rounded where an input takes 16 bits (convert-precision:io=convert).

    Args:
        threads: Intra-op threads; 0 lets onnxruntime choose.
        providers: Execution providers, in order of preference; all of them must be available.
        timeout: Seconds for one load or one run of one feed.
        memory: Refuse models whose session would need more bytes than this; None for no limit.
        deterministic: Use deterministic kernels, and seed random nodes by the name of their output.
    """

    def __init__(
        self,
        threads: int = 0,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        timeout: float = 600.0,
        *,
        memory: int | None = None,
        deterministic: bool = True,
    ) -> None:
        if threads < 0:
            raise ParameterError(f"threads must be 0 (automatic) or more, not {threads}")
        if not timeout > 0:
            raise ParameterError(f"timeout must be more than 0 seconds, not {timeout:g}")
        if not providers:
            raise ParameterError("providers is empty; name at least one, such as CPUExecutionProvider")
        self._threads = threads
        self._providers = list(providers)
        self._timeout = timeout
        self._memory = memory
        self._deterministic = deterministic
        self._lock = threading.RLock()
        self._child: Child | None = None
        self._folder: Path | None = None
        self._cleanup: weakref.finalize[..., Any] | None = None
        self._models: OrderedDict[bytes, ModelFile] = OrderedDict()
        self._sessions: OrderedDict[tuple[Path, str, int], Session] = OrderedDict()
        self._count = 0
        self.version = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child and remove the private folder; the runner can be used again."""
        with self._lock:
            self._child = None
            self._sessions.clear()
            self._models.clear()
            if self._cleanup:
                self._cleanup()

    def run(
        self,
        graph: Graph,
        feeds: Iterable[dict[str, Value]],
        *,
        outputs: Sequence[str] | None = None,
        optimization: Optimization = "all",
    ) -> list[dict[str, Value]]:
        """Run the feeds and return one dict of outputs for each.

        Args:
            graph: A root Graph; it is not changed.
            feeds: Inputs by name: arrays, lists (sequences), dicts (maps), None (empty optionals).
            outputs: Names of the values to return, intermediate ones of the main graph included; None
                for the model's outputs. Asking for an intermediate value can stop onnxruntime from
                fusing the nodes around it.
            optimization: onnxruntime's graph optimization level.

        Raises:
            SessionError: onnxruntime refused the model or a feed, crashed, or took too long.
            SessionTooLarge: The model does not fit the memory budget.
            DataError: A feed has unknown or missing inputs.
            ParameterError: A provider, level or output does not exist.
        """
        return list(self.stream(graph, feeds, outputs=outputs, optimization=optimization))

    def stream(
        self,
        graph: Graph,
        feeds: Iterable[dict[str, Value]],
        *,
        outputs: Sequence[str] | None = None,
        optimization: Optimization = "all",
    ) -> Iterator[dict[str, Value]]:
        """As `run`, one feed at a time as the results are asked for."""
        with self._lock:
            model = self._model(graph)
            wanted = list(model.outputs if outputs is None else dict.fromkeys(outputs))
            for name in wanted:
                if name not in model.outputs and name not in model.values:
                    raise ParameterError(
                        f"model {model.title} has no value {quote(name)} in its main graph"
                        f"{suggest(name, model.values | set(model.outputs))}"
                    )
            if model.random:  # its generators have moved on: start them afresh
                self._drop(model.with_outputs(wanted), optimization)
        for number, feed in enumerate(feeds):
            with self._lock:
                if self._child is None or all(kept is not model for kept in self._models.values()):
                    model = self._model(graph)
                session = self._session(model, model.with_outputs(wanted), optimization)
                fitted = session.fit(feed, number)
                doing = f"running model {model.title} on feed {number}"
                answer = self._request_on(number, doing, "run", key=session.key, feed=fitted, outputs=wanted)
            yield answer["outputs"]

    def measure(
        self,
        graph: Graph,
        feeds: Iterable[tuple[int, dict[str, Value], int]],
        specification: Mapping[str, Any],
        *,
        nodes: Sequence[NodeProto] = (),
        outputs: Sequence[str] = (),
        parallel: int = 1,
    ) -> dict[str, Any]:
        """Measure values of feeds inside the child, so that they never leave it; see worker.measure.

        Args:
            graph: A root Graph; it is not changed.
            feeds: Number, inputs and samples of each.
            specification: What to measure: arguments of Measurement.
            nodes: Nodes to add to the model.
            outputs: Values to make outputs, of those nodes or of the main graph.
            parallel: Feeds to run at a time, each on one thread; with 1, the runner's threads serve one
                feed. Only models without random nodes on the CPU run in parallel.

        Raises:
            As `stream`.
        """
        with self._lock:
            model = self._model(graph)
            path = model.with_outputs(outputs, nodes)
            if model.random or self._providers != ["CPUExecutionProvider"]:
                parallel = 1
            threads = 1 if parallel > 1 else self._threads
            if model.random:
                self._drop(path, "all", threads)
            session = self._session(model, path, "all", threads)
            doing = f"measuring model {model.title}"
            self._request(doing, "measure", key=session.key, parallel=parallel, **specification)
            for number, feed, samples in feeds:
                fitted = session.fit(feed, number)
                near = f"{doing} near feed {number}"
                self._request_on(number, near, "measure_feed", number=number, feed=fitted, samples=samples)
            return self._request(doing, "measured")

    @property
    def parallel(self) -> int:
        """Feeds that `measure` may run at a time: as many as the threads this runner may use."""
        if self._threads:
            return self._threads
        affinity = getattr(os, "sched_getaffinity", None)
        return len(affinity(0)) if affinity else os.cpu_count() or 1

    def load_seconds(self, graph: Graph, *, optimization: Optimization = "all") -> float:
        """Return the seconds that creating a session takes, measured now; raises as `run`."""
        with self._lock:
            model = self._model(graph)
            self._drop(model.path, optimization)
            return self._session(model, model.path, optimization).seconds

    def run_seconds(self, graph: Graph, feed: dict[str, Value], enough: float = 0.02) -> float:
        """Return the least seconds of runs of one feed that follow each other for `enough` seconds.

        They are timed in the child: passing values and saving the model, most of `run` where a model is small,
        does not count. Raises as `run`.
        """
        with self._lock:
            model = self._model(graph)
            session = self._session(model, model.path, "all")
            fitted = session.fit(feed, 0)
            doing = f"timing model {model.title}"
            outputs = list(model.outputs)
            answer = self._request_on(
                0, doing, "clock", key=session.key, feed=fitted, outputs=outputs, enough=enough
            )
            return float(answer["seconds"])

    def noise(self, graph: Graph, feeds: Sequence[dict[str, Value]]) -> float:
        """Return how much onnxruntime differs from itself: optimization off against all.

        The figure is the largest relative difference over the outputs, as `compare_outputs` defines
        it. Outputs that disagree on what is finite, and outputs that are not floating point, do not
        count: noise is what rounding explains.
        """
        plain = self.run(graph, feeds, optimization="off")
        fused = self.run(graph, feeds, optimization="all")
        errors = compare_outputs(plain, fused)
        return max((e.relative for e in errors if e.floating and np.isfinite(e.relative)), default=0.0)

    def _model(self, graph: Graph) -> ModelFile:
        """Return the graph's file, saved unless the same content was before."""
        if graph.root is not graph:
            raise SessionError(f"graph {quote(graph.name)} is a body; run the whole model")
        title = quote(graph.name or "(unnamed)")
        weights = weight_bytes(graph)
        if self._memory is not None and weights * _MEMORY_FACTOR > self._memory:
            raise SessionTooLarge(
                f"model {title} has {weights} bytes of weights: a session needs about "
                f"{int(weights * _MEMORY_FACTOR)} bytes, more than the memory budget of {self._memory}"
            )
        light = graph.light_model().SerializeToString(deterministic=True)
        digest = hashlib.blake2b(light, digest_size=16).digest()
        self._start()
        model = self._models.get(digest)
        if model is None:
            assert self._folder is not None
            self._count += 1
            folder = self._folder / f"model_{self._count}"
            try:
                model = ModelFile.save(graph, folder, title, weights, seeds=self._deterministic)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            self._models[digest] = model
            self._evict()
        self._models.move_to_end(digest)
        return model

    def _evict(self) -> None:
        """Remove the least recently used models past the number that is kept."""
        while len(self._models) > _CACHED:
            _, old = self._models.popitem(last=False)
            for path, level, threads in [key for key in self._sessions if key[0].parent == old.path.parent]:
                self._drop(path, level, threads)
            shutil.rmtree(old.path.parent, ignore_errors=True)

    def _start(self) -> None:
        """Start the child unless it runs, and check the providers."""
        if self._child is not None:
            return
        if self._cleanup:
            self._cleanup()
        self._models.clear()
        self._sessions.clear()
        self._folder = Path(tempfile.mkdtemp(prefix="onnxslim_lab-"))
        self._child = Child(self._folder, self._timeout)
        self._cleanup = weakref.finalize(self, _dispose, self._child, self._folder)
        hello = self._request("starting", "hello")
        self.version = hello["version"]
        for provider in self._providers:
            if provider not in hello["providers"]:
                self.close()
                raise ParameterError(
                    f"execution provider {quote(provider)} is not available in this onnxruntime"
                    f"{suggest(provider, hello['providers'])}"
                )

    def _request_on(self, feed_number: int, doing: str, call: str, **arguments: Any) -> dict[str, Any]:
        """Send a request with a feed, which may hold what cannot be sent."""
        try:
            return self._request(doing, call, **arguments)
        except TypeError as error:
            raise DataError(f"feed {feed_number}: {error}") from None

    def _request(self, doing: str, call: str, **arguments: Any) -> dict[str, Any]:
        """Send a request to the child; forget a child that died."""
        assert self._child is not None
        try:
            return self._child.request(doing, call, **arguments)
        except ChildError as error:
            raise SessionError(f"onnxruntime failed {doing}: {self._tidy(str(error))}") from None
        except TypeError:
            raise
        except BaseException:
            self._child.close()
            self._child = None
            raise

    def _tidy(self, text: str) -> str:
        """Return an onnxruntime message without its prefix and our paths."""
        text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : (\w+) : ", r"\1: ", text)
        text = re.sub(r"Load model from \S+ failed: ?", "", text).replace(str(self._folder), "")
        return one_line(" ".join(text.split()), 600)

    def _session(
        self, model: ModelFile, path: Path, optimization: str, threads: int | None = None
    ) -> Session:
        """Return the session of a file at a level, created unless it is kept."""
        threads = self._threads if threads is None else threads
        if optimization not in _LEVELS:
            raise ParameterError(
                f"no optimization level {quote(optimization)}{suggest(optimization, _LEVELS)}"
            )
        session = self._sessions.get((path, optimization, threads))
        if session is None:
            while self._sessions and not self._room_for(model):
                self._drop(*next(iter(self._sessions)))
            key = f"{path}:{optimization}:{threads}"
            answer = self._request(
                f"loading model {model.title}",
                "load",
                key=key,
                path=str(path),
                level=_LEVELS[optimization],
                threads=threads,
                providers=self._providers,
                deterministic=self._deterministic,
            )
            unused = [p for p in self._providers if p not in answer["providers"]]
            if unused:
                self._request("dropping a session", "drop", key=key)
                raise SessionError(f"onnxruntime could not use {', '.join(unused)} for model {model.title}")
            session = Session.answered(key, model.bytes, answer)
            self._sessions[path, optimization, threads] = session
        self._sessions.move_to_end((path, optimization, threads))
        return session

    def _room_for(self, model: ModelFile) -> bool:
        """Whether one more session can be kept."""
        if len(self._sessions) >= _CACHED:
            return False
        held = model.bytes + sum(session.bytes for session in self._sessions.values())
        return self._memory is None or held * _MEMORY_FACTOR <= self._memory

    def _drop(self, path: Path, optimization: str, threads: int | None = None) -> None:
        """Release a session if it is there."""
        key = (path, optimization, self._threads if threads is None else threads)
        session = self._sessions.pop(key, None)
        if session and self._child:
            self._request("dropping a session", "drop", key=session.key)


def _dispose(child: Child, folder: Path) -> None:
    """End a child and remove its folder."""
    child.close()
    shutil.rmtree(folder, ignore_errors=True)
