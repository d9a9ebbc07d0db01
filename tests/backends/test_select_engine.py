"""Which engine runs a bundle, why none does, and that none is trusted before its golden edits passed."""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spmdeploy
from spmdeploy import cli
from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.backends.base import OpenedBackend, bind_layout
from spmdeploy.backends.registry import open_backend
from spmdeploy.backends.verify import GoldenSample
from spmdeploy.bundle.bundle import Bundle, open_bundle
from spmdeploy.bundle.manifest import REFINE
from spmdeploy.bundle.writer import BundleWriter
from spmdeploy.engines import library as engine_library
from spmdeploy.engines.pack import pack
from spmdeploy.engines.record import EngineFile, EngineRecord, Gpu, SourceFile
from spmdeploy.engines.store import find_engines
from spmdeploy.engines.writer import EngineWriter, choose_place
from spmdeploy.errors import BundleError, SpmDeployError, UnavailableError, UsageError, VerificationError
from spmdeploy.imaging import files as images
from spmdeploy.types import LayoutInput, ModelInput
from tests.backends.test_tensorrt import SIZE, inputs_for, record_of, refine_inputs
from tests.bundle.conftest import GRAPHS, fill, manifest_of
from tests.simulators.records import A10, for_targets
from tests.simulators.simulated_gpu import Code, SimulatedGpu
from tests.simulators.simulated_packages import plug_in
from tests.simulators.simulated_tensorrt import edited_like, engine_content, simulated_library

GOLDEN = inputs_for(1, seed=5)


class Machine:
    """A machine with a GPU and both libraries; `libraries` are the simulated modules."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.patch, self.gpu = patch, SimulatedGpu()
        plug_in(patch, self.gpu)
        patch.setenv("SPMDEPLOY_CACHE", str(folder / "cache"))
        patch.setattr(engine_library, "_loggers", {})
        versions = {"tensorrt": "10.16.1", "tensorrt-rtx": "1.7.1.116"}
        self.libraries = {
            runtime: simulated_library(self.gpu, runtime, version) for runtime, version in versions.items()
        }
        for runtime, library in self.libraries.items():
            patch.setitem(sys.modules, runtime.replace("-", "_"), library)

    def without(self, runtime: str) -> None:
        self.patch.setitem(sys.modules, runtime.replace("-", "_"), None)

    def without_driver(self) -> None:
        def missing(name: str) -> None:
            raise OSError(f"{name}: no such file")

        self.patch.setattr("spmdeploy.gpu.driver.ctypes.CDLL", missing)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle whose golden edit, and what becomes of it, is what simulated engines compute."""
    images_of = {
        **{name: GOLDEN[name][0] for name in ("image", "labels")},
        "expected": edited_like(GOLDEN)["edited"][0],
    }
    images_of["mask"] = GOLDEN["mask"][0] * 255
    coarse = GoldenSample(ModelInput(**GOLDEN), expected=images_of["expected"][None]).coarse
    images_of["refined"] = np.rint(edited_like({**GOLDEN, "coarse": coarse})["unrounded"][0]).astype(np.uint8)
    with BundleWriter(tmp_path / "street.spm") as writer:
        graphs = fill(writer)
        for name, pixels in images_of.items():
            writer.path(f"golden/tree/{name}.png").unlink(missing_ok=True)
            images.write_image(writer.path(f"golden/tree/{name}.png"), pixels)
        images.write_image(writer.path("golden/tree/instances.png"), GOLDEN["instances"][0].astype(np.uint8))
        return writer.finish(manifest_of(graphs, native_size=SIZE))


def add(bundle: Bundle, record: EngineRecord, place: Any = None, **changes: Any) -> Path:
    """Puts an engine of that record in place, as a build does. changes: to the engine's facts."""
    content = engine_content(record, **changes)
    onnx = f"graphs/edit.{record.precision}.onnx"
    record = replace(
        record,
        bundle="street",
        onnx=SourceFile(onnx, hashlib.sha256(GRAPHS[record.precision]).hexdigest()),
        engine=EngineFile(f"{record.graph}.engine", len(content), hashlib.sha256(content).hexdigest()),
    )
    with EngineWriter(place or choose_place(bundle), "x") as writer:
        return writer.finish(record, content)


def edit_once(opened: OpenedBackend) -> None:
    """The session runs, and is closed."""
    given = inputs_for(3, 1)
    assert np.array_equal(opened.session.run(ModelInput(**given)), edited_like(given)["edited"])
    opened.session.close()


def fallen_back(bundle: Bundle, patch: pytest.MonkeyPatch, **options: str) -> list[str]:
    """The choices of `auto` where ONNX Runtime is taken; it is simulated, as the graphs are made up."""
    made: list[tuple[Any, ...]] = []
    patch.setattr("spmdeploy.backends.onnxruntime.OnnxRuntimeSession", lambda *arguments, **_: made.append(arguments))
    opened = open_backend(bundle, **options)
    assert len(made) == 1 and opened.session is None
    return list(opened.choices)


def test_auto_with_a_compatible_engine_takes_it(machine: Machine, bundle: Bundle) -> None:
    path = add(bundle, record_of())
    opened = open_backend(bundle)
    assert (opened.session.backend, opened.session.device, opened.session.precision) == ("tensorrt", "cuda:0", "fp16")
    backend, device, precision = opened.choices
    assert backend.startswith(
        f"backend tensorrt: {path} was built for NVIDIA GeForce RTX 3060 (sm86); its golden edits"
    )
    assert device.startswith("device cuda:0: ") and precision.startswith("precision fp16: faster")
    edit_once(opened)
    assert open_backend(bundle, device="cuda:0", precision="fp16").choices[1:] == ()
    assert machine.gpu.left_behind != {}


def test_auto_with_several_engines_takes_the_best(machine: Machine, bundle: Bundle) -> None:
    for record in (
        replace(for_targets("sm86"), **ports_of(record_of())),
        record_of(most=4),
        replace(record_of(), precision="fp32"),
        record_of(most=8),
        replace(record_of(most=16), gpu=A10),
    ):
        add(bundle, record)
    opened = open_backend(bundle)
    assert (opened.session.backend, opened.session.precision) == ("tensorrt", "fp16")
    assert opened.session.max_batch == 8  # type: ignore[attr-defined]
    assert open_backend(bundle, precision="fp32").session.precision == "fp32"
    assert open_backend(bundle, "tensorrt-rtx").session.backend == "tensorrt-rtx"


def ports_of(record: EngineRecord) -> dict[str, Any]:
    return {"inputs": record.inputs, "outputs": record.outputs}


def test_session_opened_has_the_refine_engine_of_its_precision(machine: Machine, bundle: Bundle) -> None:
    add(bundle, record_of())
    with_one = open_backend(bundle).session
    assert not with_one.refines
    add(bundle, replace(record_of(graph=REFINE), precision="fp32"))  # another precision than the edit engine's
    assert not open_backend(bundle).session.refines
    add(bundle, record_of(graph=REFINE))
    opened = open_backend(bundle)
    given = inputs_for(2, coarse=True)
    assert opened.session.refines
    assert np.array_equal(opened.session.refine(*refine_inputs(given)), edited_like(given)["unrounded"])


def test_refine_engine_missing_names_the_command(machine: Machine, bundle: Bundle) -> None:
    add(bundle, record_of())
    unsupported = open_backend(bundle).session.refine_unsupported
    assert unsupported is not None and unsupported.problem == "the bundle holds no refine graph in fp16"
    (graph,) = (record for record in bundle.manifest.graphs if record.precision == "fp16")
    both = replace(bundle.manifest, graphs=(*bundle.manifest.graphs, replace(graph, graph=REFINE)))
    whole = replace(bundle, manifest=both)
    unsupported = open_backend(whole).session.refine_unsupported
    assert unsupported is not None and unsupported.problem == "an edit engine was built, but no refine engine"
    assert unsupported.hint.endswith(
        f"spmdeploy build {bundle.path} --graph refine --runtime tensorrt --precision fp16"
    )
    add(bundle, replace(record_of(graph=REFINE), precision="fp32"))
    add(bundle, replace(record_of(graph=REFINE), gpu=A10))
    unsupported = open_backend(whole).session.refine_unsupported
    assert unsupported is not None and "built on NVIDIA A10" in unsupported.problem
    assert "tensorrt in fp32, beside an edit engine of tensorrt in fp16" in unsupported.problem
    add(bundle, record_of(graph=REFINE))
    assert open_backend(whole).session.refine_unsupported is None


def test_refine_engine_alone_is_not_used(machine: Machine, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    add(bundle, record_of(graph=REFINE))
    text = "a refine engine fits this machine, but no edit engine was built"
    (choice, *_) = fallen_back(bundle, monkeypatch)
    assert text in choice and f"spmdeploy build {bundle.path} --graph edit" in choice
    with pytest.raises(BundleError, match=text) as caught:
        open_backend(bundle, "tensorrt")
    assert str(caught.value.hint).endswith(f"spmdeploy build {bundle.path} --graph edit --runtime tensorrt")


def test_auto_without_a_compatible_engine_says_why(
    machine: Machine, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fallen_back(bundle, monkeypatch)[0] == "backend onnxruntime: no engine was built for this bundle"
    add(bundle, replace(record_of(), gpu=A10, version="10.3.0"))
    why = fallen_back(bundle, monkeypatch)[0]
    assert why.startswith("backend onnxruntime: no engine fits this machine: edit-fp16-b8-")
    assert "tensorrt: built with 10.3.0, here 10.16.1, GPU: built on NVIDIA A10 (sm86), here NVIDIA GeForce" in why
    add(bundle, record_of())
    assert "it computes in fp16, not fp32" in fallen_back(bundle, monkeypatch, precision="fp32")[0]
    on_cpu = fallen_back(bundle, monkeypatch, device="cpu")[0]
    assert on_cpu == "backend onnxruntime: engines do not run on the CPU"


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda machine: machine.gpu.fails.update(cuMemAlloc=Code.CUDA_ERROR_OUT_OF_MEMORY), "has no room for"),
        (lambda machine: setattr(machine.libraries["tensorrt"], "_refuses", "Cuda failure"), "Cuda failure"),
        (lambda machine: setattr(machine.libraries["tensorrt"], "_computes", painted_black), "gives wrong results"),
        (lambda machine: plug_in(machine.patch, machine.gpu, ""), "neither PyCUDA"),
    ],
)
def test_auto_with_a_failing_engine_takes_another_backend(
    spoil: Any, text: str, machine: Machine, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(bundle, record_of())
    spoil(machine)
    why = fallen_back(bundle, monkeypatch)[0]
    assert why.startswith("backend onnxruntime: no engine for this bundle works here: ") and text in why
    with pytest.raises(SpmDeployError, match=text):
        open_backend(bundle, "tensorrt")
    machine.gpu.fails.clear()
    assert machine.gpu.left_behind == {} and machine.gpu.contexts == []


def test_auto_with_a_failing_engine_takes_the_next(machine: Machine, bundle: Bundle) -> None:
    add(bundle, record_of(most=8), weights=1 << 40)
    add(bundle, record_of(most=4))
    opened = open_backend(bundle)
    assert opened.session.max_batch == 4 and opened.notices == opened.choices[:1]  # type: ignore[attr-defined]
    assert "passed just now; tried first: " in opened.choices[0] and "has no room" in opened.choices[0]


def test_backend_by_name_without_an_engine_is_refused(machine: Machine, bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="no engine was built for this bundle") as caught:
        open_backend(bundle, "tensorrt")
    assert caught.value.exit_code == 6
    assert caught.value.hint == f"build one on this machine: spmdeploy build {bundle.path} --runtime tensorrt"
    add(bundle, replace(record_of(), gpu=Gpu("NVIDIA A10", "8.0"), version="10.3.0"))
    with pytest.raises(
        BundleError, match=r"built with 10\.3\.0, here 10\.16\.1, GPU: built on NVIDIA A10 \(sm80\), here"
    ):
        open_backend(bundle, "tensorrt")
    with pytest.raises(BundleError, match="no engine was built for this bundle"):
        open_backend(bundle, "tensorrt-rtx")  # the engine that there is concerns TensorRT alone
    for options in ({"device": "cpu"}, {"precision": "int8"}, {"device": "gpu"}):
        with pytest.raises(UsageError):
            open_backend(bundle, "tensorrt", **options)


@pytest.mark.parametrize(
    ("kept", "precision", "hint"),
    [
        ((), "auto", "add it: spmdeploy export {path} --output NEW.spm --half-weights; then build it"),
        (("fp32",), "fp16", "add it: spmdeploy export {path} --output NEW.spm --half-weights; then build it"),
        (("fp32",), "auto", "spmdeploy build {path} --runtime tensorrt --precision fp32"),
        (("fp16",), "fp32", "spmdeploy export WEIGHTS --classes CLASSES --output NEW.spm; then build it"),
        (("fp16",), "fp16", "spmdeploy build {path} --runtime tensorrt --precision fp16"),
    ],
)
def test_backend_by_name_without_the_graph_names_the_whole_command(
    kept: tuple[str, ...], precision: str, hint: str, machine: Machine, bundle: Bundle
) -> None:
    records = bundle.manifest.graphs
    graphs = tuple(record for record in records if record.precision in kept)
    if not kept:
        graphs = tuple(replace(record, graph="edit_cpu") for record in records if record.precision == "fp32")
    only = replace(bundle, manifest=replace(bundle.manifest, graphs=graphs))
    with pytest.raises(BundleError) as caught:
        open_backend(only, "tensorrt", precision=precision)
    assert caught.value.exit_code == 6 and str(caught.value.hint).endswith(hint.format(path=bundle.path))


@pytest.mark.parametrize(
    ("other", "reasons"),
    [
        ({"version": "10.3.0"}, "tensorrt: built with 10.3.0, here 10.16.1"),
        ({"gpu": Gpu("NVIDIA H100", "9.0")}, "GPU: built on NVIDIA H100 (sm90), here NVIDIA GeForce RTX 3060 (sm86)"),
        ({"os": "Windows"}, "operating system: built on Windows, here Linux"),
        ({"architecture": "aarch64"}, "architecture: built on aarch64, here x86_64"),
    ],
)
def test_edit_with_an_engine_of_another_machine_names_both_values(
    other: dict[str, Any],
    reasons: str,
    machine: Machine,
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("spmdeploy.engines.record.operating_system", lambda: ("Linux", "x86_64"))
    record = replace(record_of(), builder=replace(record_of().builder, os="Linux", architecture="x86_64"))
    on_builder = {name: value for name, value in other.items() if name in ("os", "architecture")}
    on_record = {name: value for name, value in other.items() if name not in on_builder}
    add(bundle, replace(record, builder=replace(record.builder, **on_builder), **on_record))
    sample = SAMPLE_EDITS[0]
    files = [
        "edit",
        sample.photo,
        "--labels",
        sample.labels,
        "--mask",
        sample.mask,
        "--output",
        tmp_path / "edited.png",
    ]
    options = ["--model", bundle.path, "--backend", "tensorrt", "--json"]
    assert cli.main([str(argument) for argument in (*files, *options)]) == 6
    printed = json.loads(capsys.readouterr().out)
    assert printed["error"].endswith(reasons)
    assert printed["hint"] == (
        f"build the engines again on this machine: spmdeploy build {bundle.path} --runtime tensorrt"
    )


def test_backend_by_name_without_a_library_is_unavailable(machine: Machine, bundle: Bundle) -> None:
    add(bundle, record_of())
    machine.without("tensorrt")
    with pytest.raises(UnavailableError, match="tensorrt cannot be imported") as caught:
        open_backend(bundle, "tensorrt")
    assert caught.value.exit_code == 4 and "pip install" in str(caught.value.hint)
    machine.without_driver()
    with pytest.raises(UnavailableError, match=r"tensorrt-rtx needs an NVIDIA GPU: no NVIDIA driver"):
        open_backend(bundle, "tensorrt-rtx")


def test_device_by_name_that_does_not_exist_is_unavailable(machine: Machine, bundle: Bundle) -> None:
    add(bundle, record_of())
    with pytest.raises(UnavailableError, match="cuDeviceGet with error 101"):
        open_backend(bundle, "tensorrt", "cuda:3")


def painted_black(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Right outside the mask, black under it."""
    black = np.where(inputs["mask"][..., None] != 0, 0, inputs["image"])
    return {"edited": black, "unrounded": black.astype(np.float32)}


def proof_of(opened: OpenedBackend) -> str:
    opened.session.close()
    return opened.choices[0].rpartition("; ")[2]


def test_verification_is_done_at_the_first_use_only(machine: Machine, bundle: Bundle) -> None:
    add(bundle, record_of())
    assert proof_of(open_backend(bundle)) == "its golden edits passed just now"
    (found,) = find_engines(bundle)
    assert found.record is not None and found.record.verification is not None
    noted = found.record.verification
    assert noted.passed and noted.gpu.startswith("NVIDIA GeForce RTX 3060, driver ") and noted.max_grey == 0
    machine.gpu.calls.clear()
    assert proof_of(open_backend(bundle)) == f"its golden edits passed here on {date.today()}"
    assert "execute_async_v3" not in machine.gpu.calls


def test_verification_on_another_gpu_or_driver_is_repeated(machine: Machine, bundle: Bundle, tmp_path: Path) -> None:
    machine.patch.setattr("spmdeploy.gpu.driver._KERNEL_MODULE_VERSION", tmp_path / "version")
    add(bundle, replace(for_targets("sm86"), **ports_of(record_of())))
    for version, expected in (("580.1", "just now"), ("580.1", "passed here on"), ("590.2", "just now")):
        (tmp_path / "version").write_text(version)
        assert expected in proof_of(open_backend(bundle))
    machine.gpu.name = "NVIDIA RTX A4000"
    plug_in(machine.patch, machine.gpu)
    assert "just now" in proof_of(open_backend(bundle))


def test_verification_failed_is_an_error_until_it_passes(
    machine: Machine, bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    add(bundle, record_of())
    machine.libraries["tensorrt"]._computes = painted_black
    for _ in range(2):
        with pytest.raises(VerificationError, match="tree: largest difference") as caught:
            open_backend(bundle, "tensorrt")
        assert caught.value.exit_code == 5
    (found,) = find_engines(bundle)
    assert found.record is not None and found.record.verification is not None and not found.record.verification.passed
    assert cli.main(["verify", str(bundle.path), "--backend", "tensorrt", "--json"]) == 5
    assert "gives wrong results" in json.loads(capsys.readouterr().out)["error"]
    machine.libraries["tensorrt"]._computes = edited_like
    assert "just now" in proof_of(open_backend(bundle, "tensorrt"))


def test_verification_of_a_refine_engine_is_separate(machine: Machine, bundle: Bundle) -> None:
    add(bundle, record_of())
    assert "just now" in proof_of(open_backend(bundle, "tensorrt"))
    refine = add(bundle, record_of(graph=REFINE))

    def black_when_refined(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return painted_black(inputs) if "coarse" in inputs else edited_like(inputs)

    machine.libraries["tensorrt"]._computes = black_when_refined
    with pytest.raises(VerificationError, match="tree refined: largest difference") as caught:
        open_backend(bundle, "tensorrt")
    assert caught.value.problem.startswith(str(refine))
    machine.libraries["tensorrt"]._computes = edited_like
    assert "passed here on" in proof_of(open_backend(bundle, "tensorrt"))
    noted = {found.record.graph: found.record.verification for found in find_engines(bundle) if found.record}
    assert all(proof is not None and proof.passed for proof in noted.values()) and len(noted) == 2
    machine.gpu.calls.clear()
    proof_of(open_backend(bundle, "tensorrt"))
    assert "execute_async_v3" not in machine.gpu.calls


def test_verification_of_a_zip_is_kept_in_the_cache(machine: Machine, bundle: Bundle, tmp_path: Path) -> None:
    add(bundle, record_of())

    with zipfile.ZipFile(tmp_path / "z.spm.zip", "w") as archive:
        for file in sorted(file for file in bundle.path.rglob("*") if file.is_file()):
            archive.write(file, file.relative_to(bundle.path).as_posix())
    zipped = open_bundle(tmp_path / "z.spm.zip")
    assert proof_of(open_backend(zipped)) == "its golden edits passed just now"
    assert "passed here on" in proof_of(open_backend(zipped))
    (kept,) = (tmp_path / "cache" / "verified").iterdir()
    kept.write_bytes(kept.read_bytes().replace(b'"edit"', b'"refine"', 1))
    assert "just now" in proof_of(open_backend(zipped))  # that was of another engine
    kept.write_text("rubbish")
    assert "just now" in proof_of(open_backend(zipped))


def test_verification_that_cannot_be_stored_is_noted(machine: Machine, bundle: Bundle, tmp_path: Path) -> None:
    zipped = open_bundle(pack(bundle, tmp_path / "z.spm.zip"))
    add(zipped, record_of())  # into the cache
    (tmp_path / "cache" / "verified").write_text("a file where the folder should be")
    machine.patch.setattr("spmdeploy.engines.store.StoredEngine.with_verification", refuse_to_write)
    assert "passed just now, which cannot be noted: " in open_backend(zipped).choices[0]


def refuse_to_write(self: object, verification: object) -> None:
    from spmdeploy.errors import InputError

    raise InputError("no room", "make some")


def test_verify_and_edit_run_on_an_engine(
    machine: Machine, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(bundle, record_of(), capturable=False)
    assert cli.main(["verify", str(bundle.path), "--backend", "tensorrt", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["backend"], printed["device"], printed["precision"]) == ("tensorrt", "cuda:0", "fp16")
    assert printed["provider"].startswith("TensorRT 10.16.1 on NVIDIA GeForce RTX 3060 (cuda-core")

    images.write_image(tmp_path / "photo.png", np.zeros((SIZE, SIZE, 3), np.uint8))
    images.write_image(tmp_path / "mask.png", np.pad(np.full((2, 2), 255, np.uint8), SIZE // 2 - 1))
    arguments = ["edit", tmp_path / "photo.png", "--fill", "sky", "--mask", tmp_path / "mask.png", "--json"]
    more = ["--output", tmp_path / "out.png", "--model", bundle.path, "--backend", "tensorrt"]
    assert cli.main([str(argument) for argument in [*arguments, *more]]) == 0
    assert json.loads(capsys.readouterr().out)["report"]["backend"] == "tensorrt"
    assert machine.gpu.left_behind == {}


def test_edit_without_cuda_graphs_notes_it(machine: Machine, bundle: Bundle) -> None:
    add(bundle, record_of(), capturable=False)
    mask = np.zeros((SIZE, SIZE), bool)
    mask[4:8, 4:8] = True
    with spmdeploy.open_editor(bundle.path) as editor:
        for _ in range(2):
            result = editor.edit(np.zeros((SIZE, SIZE, 3), np.uint8), np.ones((SIZE, SIZE), np.uint8), mask)
    assert any("without CUDA graphs" in note for note in result.report.notes)


def test_engines_for_cached_layouts_are_found_and_verified(machine: Machine, bundle: Bundle) -> None:
    add(bundle, record_of())
    unsupported = open_backend(bundle).session.layout_unsupported  # type: ignore[attr-defined]
    assert unsupported.problem.startswith("there is no layout and picture engine of tensorrt in fp16")
    add(bundle, record_of(graph="layout"))
    add(bundle, record_of(graph="picture"))
    session = open_backend(bundle).session
    assert session.layout_unsupported is None  # type: ignore[attr-defined]
    run = bind_layout(session, LayoutInput(*ModelInput(**GOLDEN)[1:]))
    assert np.array_equal(run(GOLDEN["image"]), edited_like(GOLDEN)["edited"])


def test_verification_of_engines_for_cached_layouts_names_the_edit(machine: Machine, bundle: Bundle) -> None:
    for graph in ("edit", "layout", "picture"):
        add(bundle, record_of(graph=graph))

    def black_from_cached_tensors(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        computed = edited_like(inputs)
        return {name: array * 0 for name, array in computed.items()} if "heads/Add" in inputs else computed

    machine.libraries["tensorrt"]._computes = black_from_cached_tensors
    with pytest.raises(VerificationError, match="tree with a cached layout"):
        open_backend(bundle, "tensorrt")
