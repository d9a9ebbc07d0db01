"""Fuzzes every reader with changed inputs: each ends with a result or a package error, in bounded time and memory.

Run by `make fuzz`. A seed is a number, so that a failure is repeated by `-k NAME` alone; SPMDEPLOY_FUZZ multiplies the
number of inputs, SPMDEPLOY_FUZZ_SEED chooses others.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.bundle.manifest import Manifest
from spmdeploy.bundle.signature import (
    check_signature,
    new_key,
    read_public_key,
    read_secret_key,
    sign,
    write_key_pair,
)
from spmdeploy.bundle.storage import MANIFEST
from spmdeploy.cli.app import build_app, main
from spmdeploy.editing.manifest import read_manifest
from spmdeploy.editing.session import Session, read_session, write_session
from spmdeploy.engines.pack import pack
from spmdeploy.engines.record import EngineRecord
from spmdeploy.engines.store import find_engines
from spmdeploy.errors import SpmDeployError
from spmdeploy.imaging.files import read_instances, read_labels, read_photo
from spmdeploy.imaging.mask_files import read_mask
from spmdeploy.labels import class_table
from spmdeploy.types import Padding
from tests.bundle.conftest import list_sums
from tests.fuzz.corpus import BATCHES, VALUES, bundle_files, images, mutated, mutated_json, records
from tests.simulators.records import HOST

pytestmark = [pytest.mark.fuzz, pytest.mark.filterwarnings("ignore")]

SECONDS, BYTES = 60, 2 << 30
"""The longest that one input may take, and the most memory that a kind of input may add."""
SCALE = float(os.environ.get("SPMDEPLOY_FUZZ", "1"))
SEED = os.environ.get("SPMDEPLOY_FUZZ_SEED", "0")


class Hang(BaseException):
    """An input took longer than `SECONDS`."""


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


class Fuzzer:
    """Runs one kind of input and collects failures, one for each place in the code."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.source = random.Random(f"{name} {SEED}")
        self.outcomes: Counter[str] = Counter()
        self.failures: dict[str, str] = {}
        self.longest = 0.0
        self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def rounds(self, count: int) -> Iterator[int]:
        yield from range(max(1, round(count * SCALE)))

    def run(self, action: Callable[[], object], shown: object) -> None:
        """action: may return text to count it by. shown: text that identifies the input in a failure."""
        started = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            result = action()
            self.outcomes[result if isinstance(result, str) else "read"] += 1
        except SpmDeployError as exc:
            self.outcomes[f"exit {exc.exit_code}"] += 1
            if not exc.problem or "\x1b" in f"{exc.problem}{exc.hint}":
                self._fail("a message without text or with escape sequences", exc, shown)
        except BaseException as exc:
            if isinstance(exc, KeyboardInterrupt):
                raise
            self._fail(f"{type(exc).__name__}: {exc}"[:300], exc, shown)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.longest = max(self.longest, time.perf_counter() - started)

    def _fail(self, problem: str, exc: BaseException, shown: object) -> None:
        frames = [frame for frame in traceback.extract_tb(exc.__traceback__) if "/spmdeploy/" in frame.filename]
        place = f"{frames[-1].filename.rpartition('/spmdeploy/')[2]}:{frames[-1].lineno}" if frames else "?"
        self.outcomes["FAILED"] += 1
        self.failures.setdefault(f"{type(exc).__name__} at {place}", f"{problem}\n    input: {str(shown)[:600]}")

    def finish(self) -> None:
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.peak) * 1024
        outcomes = f"{sum(self.outcomes.values())} inputs, {dict(self.outcomes)}"
        print(f"\n{self.name}: {outcomes}, longest {self.longest:.2f} s, +{grown >> 20} MiB to {_peak_mib()} MiB")
        assert not self.failures, "\n".join(f"{where}: {what}" for where, what in self.failures.items())
        assert grown < BYTES, f"{grown >> 20} MiB"


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def fuzzer(request: pytest.FixtureRequest) -> Iterator[Fuzzer]:
    fuzzer = Fuzzer(request.node.name)
    yield fuzzer
    fuzzer.finish()


def fuzz_json(fuzzer: Fuzzer, value: Any, read: Callable[[bytes], object], count: int) -> None:
    plain = json.dumps(value).encode()
    for i in fuzzer.rounds(count):
        content = mutated(plain, fuzzer.source, [plain]) if i % 4 == 0 else mutated_json(value, fuzzer.source)
        fuzzer.run(lambda content=content: read(content), content)


def test_fuzz_manifest_raises_only_package_errors(fuzzer: Fuzzer) -> None:
    def read(content: bytes) -> None:
        manifest = Manifest.from_bytes(content, "m.json")
        assert Manifest.from_bytes(manifest.to_bytes(), "m.json") == manifest

    fuzz_json(fuzzer, records()["manifest.json"], read, 2500)


def test_fuzz_engine_record_raises_only_package_errors(fuzzer: Fuzzer) -> None:
    def read(content: bytes) -> None:
        record = EngineRecord.from_bytes(content, "e.json")
        assert EngineRecord.from_bytes(record.to_bytes(), "e.json") == record and record.key

    fuzz_json(fuzzer, records()["engine.json"], read, 2000)


def test_fuzz_class_table_raises_only_package_errors(fuzzer: Fuzzer, tmp_path: Path) -> None:
    path = tmp_path / "classes.json"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        class_table(path)

    fuzz_json(fuzzer, records()["classes.json"], read, 1000)


def test_fuzz_training_configuration_raises_only_package_errors(fuzzer: Fuzzer, tmp_path: Path) -> None:
    config = pytest.importorskip("spmdeploy.training.config")
    (tmp_path / "train/images").mkdir(parents=True)
    path = tmp_path / "config.json"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        config.read_config(path)

    fuzz_json(fuzzer, config.to_json(config.build_config(tmp_path, images=100)), read, 1000)


def read_all(path: Path) -> None:
    """Reads a bundle as the commands do."""
    bundle = open_bundle(path)
    bundle.check_all()
    for record in bundle.manifest.graphs:
        bundle.read_graph(record)
    find_engines(bundle, HOST)


def test_fuzz_zipped_bundle_raises_only_package_errors(fuzzer: Fuzzer, tmp_path: Path) -> None:
    files = bundle_files(tmp_path / "street.spm")
    whole = pack(open_bundle(tmp_path / "street.spm"), tmp_path / "one.spm").read_bytes()
    path = tmp_path / "changed.spm"
    for _ in fuzzer.rounds(1200):
        path.write_bytes(mutated(whole, fuzzer.source, list(files.values())))
        fuzzer.run(lambda: read_all(path), path)


def test_fuzz_bundle_with_new_hashes_raises_only_package_errors(fuzzer: Fuzzer, tmp_path: Path) -> None:
    folder = tmp_path / "street.spm"
    files = bundle_files(folder)
    engine = folder / "engines/some/engine.json"
    engine.parent.mkdir(parents=True)
    for _ in fuzzer.rounds(800):
        name = fuzzer.source.choice([*files, str(engine.relative_to(folder))])
        before = files.get(name)
        if name == MANIFEST:
            (folder / name).write_bytes(mutated_json(json.loads(files[name]), fuzzer.source))
        elif before is None:
            engine.write_bytes(mutated_json(records()["engine.json"], fuzzer.source))
        else:
            (folder / name).write_bytes(mutated(before, fuzzer.source, list(files.values())))
        if name != "SHA256SUMS" and before is not None:
            engine.unlink(missing_ok=True)
            list_sums(folder)
        fuzzer.run(lambda: read_all(folder), name)
        for unchanged in {name, "SHA256SUMS"} & files.keys():
            (folder / unchanged).write_bytes(files[unchanged])


@pytest.mark.parametrize("read", [read_photo, read_labels, read_instances, read_mask])
def test_fuzz_image_raises_only_package_errors(fuzzer: Fuzzer, read: Callable[..., object], tmp_path: Path) -> None:
    corpus = images()
    for i in fuzzer.rounds(750):
        name = fuzzer.source.choice(list(corpus))
        content = corpus[name] if i < len(corpus) else mutated(corpus[name], fuzzer.source, list(corpus.values()))
        path = tmp_path / name
        path.write_bytes(content)
        fuzzer.run(lambda path=path: read(path), content.hex())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".json"])
def test_fuzz_checkpoint_raises_only_package_errors(fuzzer: Fuzzer, suffix: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    checkpoint = pytest.importorskip("spmdeploy.model.checkpoint")
    generator = pytest.importorskip("spmdeploy.model.generator")
    torch.manual_seed(0)
    path = tmp_path / "tiny.safetensors"
    network = generator.Generator(generator.GeneratorConfig(classes=2, width=1, hidden=1))
    checkpoint.save_generator(network, path)
    target = tmp_path / f"tiny{suffix}"
    if suffix == ".pth":
        torch.save(dict(list(network.state_dict().items())[:8]), target)
    whole = target.read_bytes()
    for _ in fuzzer.rounds(300):
        if suffix == ".json":
            content = mutated_json(records()["generator.json"], fuzzer.source)
        else:  # the first bytes are the header, which describes the rest
            start = whole[: fuzzer.source.choice((200, 4000, len(whole)))]
            content = mutated(start, fuzzer.source, [whole[:4000]]) + whole[len(start) :]
        target.write_bytes(content)
        shown = content if suffix == ".json" else content[:300]
        fuzzer.run(lambda: checkpoint.load_checkpoint(path if suffix == ".json" else target), shown)


def test_fuzz_batch_manifest_raises_only_package_errors(fuzzer: Fuzzer, tmp_path: Path) -> None:
    for name, content in images().items():
        (tmp_path / name).write_bytes(content)
    for _ in fuzzer.rounds(1200):
        name = fuzzer.source.choice(list(BATCHES))
        content = mutated(BATCHES[name], fuzzer.source, list(BATCHES.values()))
        (tmp_path / name).write_bytes(content)
        fuzzer.run(lambda name=name: read_manifest(tmp_path / name, tmp_path / "out"), content)


def test_fuzz_session_raises_only_package_errors(fuzzer: Fuzzer, tmp_path: Path) -> None:
    corpus, path = images(), tmp_path / "session.zip"
    session = Session(corpus["exif.jpg"], "a.jpg", fill="sky", extend=Padding(1, 2, 3, 4))
    whole = write_session(session)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    for i in fuzzer.rounds(800):
        content = mutated(whole, fuzzer.source, list(parts.values()))
        if i % 2:  # a sound zip with another record
            stream = io.BytesIO()
            with zipfile.ZipFile(stream, "w") as archive:
                for name, part in parts.items():
                    changed = name.endswith(".json")
                    archive.writestr(name, mutated_json(json.loads(part), fuzzer.source) if changed else part)
            content = stream.getvalue()
        path.write_bytes(content)
        fuzzer.run(lambda: read_session(path), content[:300])


def test_fuzz_resume_state_raises_only_package_errors(fuzzer: Fuzzer, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    run_dir = pytest.importorskip("spmdeploy.training.run_dir")
    run = run_dir.RunDirectory(tmp_path)
    moments = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    parts = {name: {} for name in ("generator", "averaged", "discriminators")}
    optimizers = {"generator_optimizer": moments, "discriminator_optimizer": moments}
    run.save_checkpoint({"progress": {"phase": 0}, **parts, **optimizers, "random": torch.get_rng_state()})
    whole = run.checkpoint.read_bytes()
    for _ in fuzzer.rounds(400):
        content = mutated(whole, fuzzer.source, [whole[:4000]])
        run.checkpoint.write_bytes(content)
        fuzzer.run(run.load_checkpoint, content[:300])


def test_fuzz_signature_and_keys_raise_only_package_errors(fuzzer: Fuzzer, tmp_path: Path) -> None:
    pytest.importorskip("minisign")
    secret, content, path = new_key(), b"hello", tmp_path / "key"
    secret_path, public_path = write_key_pair(tmp_path / "pair", secret, None)
    key, signature = read_public_key(public_path), sign(content, secret, "street")
    files = [signature, public_path.read_bytes(), secret_path.read_bytes()]
    readers: list[Callable[[], object]] = [
        lambda: check_signature(content, path.read_bytes(), key, path),
        lambda: read_public_key(path),
        lambda: read_secret_key(path, lambda: "password"),
    ]
    for i in fuzzer.rounds(900):
        path.write_bytes(mutated(files[i % 3], fuzzer.source, files))
        fuzzer.run(readers[i % 3], path.read_bytes())


LEFT_OUT = {"bench", "train", "evaluate", "doctor", "serve", "studio"}
"""Commands that measure, train, look at the machine or wait for connections; --thorough is left out as well."""


def test_fuzz_command_line_ends_with_exit_codes(
    fuzzer: Fuzzer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPMDEPLOY_CACHE", str(tmp_path / "cache"))
    files = images() | BATCHES | {name: json.dumps(value).encode() for name, value in records().items()}
    bundle_files(tmp_path / "street.spm")
    commands = list(_commands(get_command(build_app()), ()))
    names = [*files, "street.spm", "missing", ".", "/dev/null", "out.png", "out", "a" * 300, "\udcff"]
    values = [str(value) for value in VALUES if "\0" not in str(value)]
    for _ in fuzzer.rounds(700):
        for name in fuzzer.source.sample(list(files), 2):
            changed = mutated(files[name], fuzzer.source, list(files.values()))
            if (tmp_path / name).is_dir():  # a command was given the name for its output
                shutil.rmtree(tmp_path / name)
            (tmp_path / name).write_bytes(changed if fuzzer.source.random() < 0.7 else files[name])
        command, options = fuzzer.source.choice(commands)
        arguments = [*command, *(fuzzer.source.choice(names) for _ in range(fuzzer.source.choice((0, 1, 1, 1, 2))))]
        for option in fuzzer.source.sample(options, min(len(options), fuzzer.source.randrange(7))):
            arguments.append(option)
            if fuzzer.source.random() < 0.8:
                arguments.append(fuzzer.source.choice(names if fuzzer.source.random() < 0.6 else values))
        fuzzer.run(lambda arguments=arguments: _run_command(arguments), arguments)


def _commands(command: Any, above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    for name, inner in getattr(command, "commands", {}).items():
        if name not in LEFT_OUT:
            yield from _commands(inner, (*above, name))
    if above and not getattr(command, "commands", None):
        options = (option for parameter in command.params for option in parameter.opts)
        yield above, [option for option in options if option.startswith("-") and option != "--thorough"]


def _run_command(arguments: list[str]) -> str:
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        exit_code = main(arguments)
    text = stdout.getvalue() + stderr.getvalue()
    if "this is a defect" in text or "Traceback" in text or exit_code not in (0, *range(2, 9)):
        raise AssertionError(f"exit code {exit_code}: {text[-600:]}")
    if "--json" in arguments and exit_code and stdout.getvalue().strip():
        json.loads(stdout.getvalue())
    return f"exit {exit_code}"
