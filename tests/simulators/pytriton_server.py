"""Runs a real Triton Inference Server, the one in the package nvidia-pytriton, with models of `export-triton`.

The package has only Triton's Python backend. So the models keep their configuration but for the backend's name, and a
model.py runs their graphs in ONNX Runtime.

    pip install --no-deps nvidia-pytriton
    python -m tests.simulators.pytriton_server REPOSITORY     # changes the repository and prints the address
"""

from __future__ import annotations

import os
import signal
import site
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

MODEL = """
import os, sys
sys.path += {packages!r}
import numpy as np
import onnxruntime
import triton_python_backend_utils as pb

class TritonPythonModel:
    def initialize(self, args):
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.inputs = [port.name for port in self.session.get_inputs()]

    def execute(self, requests):
        responses = []
        for request in requests:
            # By DLPack: this version of the backend does not know the arrays of numpy 2.
            inputs = {name: np.from_dlpack(pb.get_input_tensor_by_name(request, name)) for name in self.inputs}
            names = request.requested_output_names()
            results = self.session.run(names, inputs)
            tensors = [pb.Tensor.from_dlpack(name, result) for name, result in zip(names, results)]
            responses.append(pb.InferenceResponse(tensors))
        return responses
"""


def server_folder() -> Path | None:
    """The folder of the server, if the package is installed."""
    spec = find_spec("pytriton")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "tritonserver"


def use_python_backend(repository: Path) -> None:
    for config in repository.glob("*/config.pbtxt"):
        text = config.read_text().replace('backend: "onnxruntime"', 'backend: "python"')
        config.write_text(text.replace('default_model_filename: "model.onnx"', 'default_model_filename: "model.py"'))
        (config.parent / "1" / "model.py").write_text(MODEL.replace("{packages!r}", repr(site.getsitepackages())))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def serving(repository: Path, log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Serve a repository on loopback; gives HOST:PORT and the process. log: gets the server's output."""
    folder = server_folder()
    assert folder is not None, "nvidia-pytriton is not installed"
    stub = folder / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}"
    for program in (folder / "bin/tritonserver", stub / "triton_python_backend_stub"):
        program.chmod(0o755)
    backend = folder / "backends/python"
    link = backend / "triton_python_backend_stub"
    if not link.exists():
        link.symlink_to(stub / "triton_python_backend_stub")
    grpc, http, metrics = _free_ports(3)
    command = [str(folder / "bin/tritonserver"), "--model-repository", str(repository)]
    command += ["--backend-directory", str(folder / "backends"), "--grpc-address", "127.0.0.1"]
    command += ["--grpc-port", str(grpc), "--http-port", str(http), "--metrics-port", str(metrics)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True) as process,
    ):
        try:
            _wait(http, process, log)
            yield f"127.0.0.1:{grpc}", process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the models' processes too, which outlive a killed server


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server is ready, at most two minutes."""
    import urllib.error
    import urllib.request

    for _ in range(240):
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(log.read_text())


def main() -> None:
    repository = Path(sys.argv[1])
    use_python_backend(repository)
    with serving(repository, repository.parent / "tritonserver.log") as (address, process):
        print(address, flush=True)
        process.wait()


if __name__ == "__main__":
    main()
