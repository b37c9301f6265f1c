"""A model that no fork survives: on a GPU, where PyTorch finds one, else behind a thread.

A fork copies the memory of a process, and neither its threads nor its context on the GPU. CUDA
refuses to work in a forked process; a library whose threads are gone hangs there, unless it looks
for them first, as this one does.
"""

from __future__ import annotations

import os
import queue
import threading
import uuid
from concurrent.futures import Future
from typing import Any

import numpy as np

try:
    import torch
except ModuleNotFoundError:
    torch = None

WIDTH, LAYER_COUNT = 1500, 10


class ThreadModel:
    """Answers in a thread of its own, as libraries for audio, video, databases and GPUs do."""

    kind = "a thread"

    def __init__(self) -> None:
        random = np.random.default_rng(2)
        self._layers = [
            random.standard_normal((WIDTH, WIDTH), dtype=np.float32) for _ in range(LAYER_COUNT)
        ]
        self._questions: queue.SimpleQueue[tuple[int, Future[float]]] = queue.SimpleQueue()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._serve, name="model", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            question, answer = self._questions.get()
            vector = np.full(WIDTH, question, dtype=np.float32)
            for layer in self._layers:
                vector = np.tanh(layer @ vector)
            answer.set_result(float(vector.sum()))

    def predict(self, question: int) -> float:
        if not self._thread.is_alive():
            raise RuntimeError(
                f"the thread of this model runs in process {self._pid}; process {os.getpid()} was "
                "forked from it, and has only a copy of its memory"
            )
        answer: Future[float] = Future()
        self._questions.put((question, answer))
        return answer.result()


class CudaModel:
    """Layers in the memory of the GPU."""

    def __init__(self) -> None:
        self.kind = torch.cuda.get_device_name()
        torch.manual_seed(2)
        self._layers: list[Any] = [
            torch.randn(WIDTH, WIDTH, device="cuda") for _ in range(LAYER_COUNT)
        ]

    def predict(self, question: int) -> float:
        vector = torch.full((WIDTH,), float(question), device="cuda")
        for layer in self._layers:
            vector = torch.tanh(layer @ vector)
        return float(vector.sum())


#: Of this time that the module was loaded.
LOAD = uuid.uuid4().hex

MODEL = CudaModel() if torch is not None and torch.cuda.is_available() else ThreadModel()
