"""The service under load and under generated requests: no server errors, flat memory. Slow."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import spmdeploy
from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.imaging.files import read_labels, read_photo
from spmdeploy.imaging.mask_files import read_mask

httpx = pytest.importorskip("httpx", reason="the client of the tests is httpx")
pytestmark = pytest.mark.slow
SECONDS = float(os.environ.get("SPMDEPLOY_LOAD_SECONDS", "60"))
CLIENTS = 64


@pytest.fixture
def service() -> Iterator[tuple[str, int]]:
    """URL and process id of the command on the built-in model."""
    command = [sys.executable, "-m", "spmdeploy", "studio", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip().rstrip("/"), process.pid
        process.terminate()


def resident_mib(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


async def press(url: str, process: int) -> tuple[Counter[int], list[float], list[float]]:
    """Statuses, seconds of each successful edit, and memory once a second."""
    sample = SAMPLE_EDITS[0]
    photo, mask = sample.photo.read_bytes(), sample.mask.read_bytes()
    statuses: Counter[int] = Counter()
    seconds: list[float] = []
    memory: list[float] = []
    end = time.monotonic() + SECONDS

    async def client(number: int, http: Any) -> None:
        sent = 0
        while time.monotonic() < end:
            sent += 1
            malformed = (sent + number) % 10 == 0
            files = {"image": photo[: len(photo) // 2] if malformed else photo, "mask": mask}
            started = time.monotonic()
            answer = await http.post(f"{url}/v1/edits", files=files, data={"fill": "road"})
            statuses[answer.status_code] += 1
            if answer.status_code == 200:
                seconds.append(time.monotonic() - started)
            elif answer.status_code == 429:
                await asyncio.sleep(float(answer.headers["retry-after"]))

    async def watch() -> None:
        while time.monotonic() < end:
            memory.append(resident_mib(process))
            await asyncio.sleep(1)

    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(timeout=120, limits=limits, trust_env=False) as http:
        await asyncio.gather(watch(), *(client(number, http) for number in range(CLIENTS)))
    return statuses, seconds, memory


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_load_with_malformed_requests_has_no_server_errors(service: tuple[str, int]) -> None:
    url, process = service
    statuses, seconds, memory = asyncio.run(press(url, process))
    seconds.sort()
    p50, p95, p99 = (seconds[int(share * (len(seconds) - 1))] for share in (0.5, 0.95, 0.99))
    rate = len(seconds) / SECONDS
    print(f"\n{dict(statuses)}; p50 {p50:.2f} s, p95 {p95:.2f} s, p99 {p99:.2f} s; {rate:.2f} edits/s")
    half = len(memory) // 2
    print(f"memory: {memory[0]:.0f} MiB, then at most {max(memory[:half]):.0f}, {max(memory[half:]):.0f} MiB")
    sample = SAMPLE_EDITS[0]
    with spmdeploy.open_editor() as editor:
        photo, mask = read_photo(sample.photo).pixels, read_mask(sample.mask)
        labels = read_labels(sample.labels) * 0 + editor.classes.find("road").id
        started = time.monotonic()
        for _ in range(5):
            editor.edit(photo, labels, mask)
        print(f"a loop over Editor.edit: {5 / (time.monotonic() - started):.2f} edits/s")
    assert set(statuses) <= {200, 400, 429} and statuses[200] > 0 and statuses[400] > 0
    assert max(memory[half:]) < max(memory[:half]) * 1.05


def test_generated_requests_cause_no_server_errors(service: tuple[str, int], tmp_path: Path) -> None:
    command = shutil.which("st", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("schemathesis is not installed")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance"
    options = ["--checks", checks, "--max-examples", "20", "--seed", "1"]
    done = subprocess.run(
        [command, "run", f"{service[0]}/openapi.json", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
