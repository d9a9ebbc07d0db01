"""A stand-in for a Triton Inference Server: its gRPC messages, and ONNX Runtime on the CPU for the models.

    python -m tests.simulators.triton_server REPOSITORY [--requests N]

Serves the models of a repository that `export-triton` wrote, and prints the address. It does not group requests.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

DTYPES = {"UINT8": np.uint8, "INT32": np.int32, "FP32": np.float32}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class Server(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers what the client asks. Attributes may be changed while it runs."""

    def __init__(self, repository: Path, delay: float = 0.0) -> None:
        self.configs, self.sessions = {}, {}
        for folder in sorted(repository.iterdir()):
            config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            path = folder / "1" / config.default_model_filename
            self.configs[config.name] = config
            self.sessions[config.name] = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        self.delay = delay
        self.answer_with: Any = None
        """A function that replaces the result of a model."""
        self.limit: int | None = None
        """Requests after which the process kills itself."""
        self.requests: Counter[str] = Counter()
        self.most_at_once = 0
        self._running, self._lock = 0, threading.Lock()

    def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerMetadataResponse(name="triton", version="0.fake")

    def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ModelReadyResponse(ready=request.name in self.configs)

    def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._check(request.name, context)
        return service_pb2.ModelConfigResponse(config=self.configs[request.name])

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._check(request.model_name, context)
        with self._lock:
            if sum(self.requests.values()) == self.limit:
                os.kill(os.getpid(), signal.SIGKILL)
            self.requests[request.model_name] += 1
            self._running += 1
            self.most_at_once = max(self.most_at_once, self._running)
        try:
            time.sleep(self.delay)
            inputs = {
                tensor.name: np.frombuffer(content, DTYPES[tensor.datatype]).reshape(tensor.shape)
                for tensor, content in zip(request.inputs, request.raw_input_contents, strict=True)
            }
            names = [output.name for output in request.outputs]
            results = self.sessions[request.model_name].run(names, inputs)
        finally:
            with self._lock:
                self._running -= 1
        if self.answer_with is not None:
            results = [self.answer_with(result) for result in results]
        response = service_pb2.ModelInferResponse(model_name=request.model_name, model_version="1")
        for name, result in zip(names, results, strict=True):
            response.outputs.add(name=name, datatype=NAMES[result.dtype], shape=result.shape)
            response.raw_output_contents.append(result.tobytes())
        return response

    def _check(self, name: str, context: Any) -> None:
        if name not in self.configs:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{name}' is not found")


@contextmanager
def serving(server: Server) -> Iterator[str]:
    """Serves in threads of this process; gives HOST:PORT."""
    options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 1 << 26)]
    running = grpc.server(futures.ThreadPoolExecutor(16), options=options)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(server, running)
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        running.stop(None).wait()


@contextmanager
def serving_process(repository: Path, requests: int) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Serves in a process that kills itself after so many requests; gives HOST:PORT and the process."""
    command = [sys.executable, "-m", "tests.simulators.triton_server", str(repository), "--requests", str(requests)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), process
        finally:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("repository", type=Path)
    parser.add_argument("--requests", type=int)
    arguments = parser.parse_args()
    server = Server(arguments.repository)
    server.limit = arguments.requests
    with serving(server) as address:
        print(address, flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
