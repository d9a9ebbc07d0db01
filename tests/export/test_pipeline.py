"""Exported graphs agree with PyTorch, have the contracted types and shapes, and build as engines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from spmdeploy.backends.onnxruntime import OnnxRuntimeSession
from spmdeploy.backends.onnxruntime_graph import LoadedGraph
from spmdeploy.backends.pytorch import TorchSession, generator_from_graph, open_torch
from spmdeploy.backends.registry import open_backend
from spmdeploy.backends.verify import Deviation, measure_deviation, verify
from spmdeploy.bundle.bundle import GraphFiles, open_bundle
from spmdeploy.errors import BundleError, InputError, UsageError, VerificationError
from spmdeploy.export import parity, pipeline
from spmdeploy.export.external_data import ALIGNMENT, ELEMENTS, WeightStore
from spmdeploy.export.fp16 import store_weights_as_halves
from spmdeploy.export.graph_stats import graph_facts
from spmdeploy.export.onnx import IR_VERSION
from spmdeploy.export.pipeline import ExportOptions, export_bundle
from spmdeploy.labels import class_table
from spmdeploy.model.checkpoint import Checkpoint, load_checkpoint, save_generator
from spmdeploy.model.deploy import OUTPUTS, REFINE_INPUTS
from spmdeploy.model.flops import edit_gflop
from spmdeploy.model.generator import Generator, GeneratorConfig
from spmdeploy.training.ema import initialize
from spmdeploy.types import ModelInput


@pytest.fixture(scope="module")
def generator(street_bundle: Path) -> Generator:
    return load_checkpoint(street_bundle.with_name("tiny.safetensors")).generator


@pytest.fixture(scope="module")
def fp32(street_bundle: Path) -> onnx.ModelProto:
    return onnx.load(street_bundle / "graphs/edit.fp32.onnx")


@pytest.fixture(scope="module")
def fp16(street_bundle: Path) -> onnx.ModelProto:
    return onnx.load(street_bundle / "graphs/edit.fp16.onnx")


@pytest.fixture(scope="module")
def refine_fp32(street_bundle: Path) -> onnx.ModelProto:
    return onnx.load(street_bundle / "graphs/refine.fp32.onnx")


@pytest.fixture(scope="module")
def refine_fp16(street_bundle: Path) -> onnx.ModelProto:
    return onnx.load(street_bundle / "graphs/refine.fp16.onnx")


def _edits(batch: int) -> ModelInput:
    rng = np.random.default_rng(batch)
    image = rng.integers(0, 256, (batch, 256, 256, 3), dtype=np.uint8)
    labels = np.repeat(rng.integers(0, 14, (batch, 8, 8), dtype=np.uint8), 32, 1).repeat(32, 2)  # 12 and 13: no class
    instances = labels.astype(np.int32) * 1000 + rng.integers(0, 2, (batch, 256, 1), dtype=np.int32)
    mask = np.zeros((batch, 256, 256), np.uint8)
    mask[:, 60:200, 100:] = 7
    return ModelInput(image, labels, instances, mask)


@pytest.mark.parametrize("graph", ["edit", "refine"])
def test_exported_graph_has_the_inputs_and_outputs_of_the_contract(street_bundle: Path, graph: str) -> None:
    fp32, fp16 = (onnx.load(street_bundle / f"graphs/{graph}.{precision}.onnx") for precision in ("fp32", "fp16"))
    coarse = {"coarse": (TensorProto.FLOAT, ["batch", 128, 128, 3])} if graph == "refine" else {}
    for model in (fp32, fp16, store_weights_as_halves(fp32)):
        ports = {
            value.name: (
                value.type.tensor_type.elem_type,
                [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
            )
            for value in (*model.graph.input, *model.graph.output)
        }
        maps = ["batch", 256, 256]
        assert ports == {
            "image": (TensorProto.UINT8, [*maps, 3]),
            "labels": (TensorProto.UINT8, maps),
            "instances": (TensorProto.INT32, maps),
            "mask": (TensorProto.UINT8, maps),
            "edited": (TensorProto.UINT8, [*maps, 3]),
            "unrounded": (TensorProto.FLOAT, [*maps, 3]),
            **coarse,
        }
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
        assert model.ir_version <= IR_VERSION


def test_exported_graph_values_have_types_and_shapes(fp16: onnx.ModelProto, refine_fp16: onnx.ModelProto) -> None:
    for model in (fp16, refine_fp16):
        shaped = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
        for node in model.graph.node:
            for output in node.output:
                tensor = shaped[output].type.tensor_type
                assert tensor.elem_type != TensorProto.UNDEFINED
                assert all(dim.dim_param == "batch" or dim.HasField("dim_value") for dim in tensor.shape.dim), output


def test_exported_graph_uint8_inputs_are_only_cast(fp16: onnx.ModelProto, refine_fp16: onnx.ModelProto) -> None:
    for model in (fp16, refine_fp16):
        bytes_in = {value.name for value in model.graph.input if value.type.tensor_type.elem_type == TensorProto.UINT8}
        assert {node.op_type for node in model.graph.node if bytes_in & set(node.input)} == {"Cast"}


def test_exported_graph_names_are_layers_without_machine_paths(fp32: onnx.ModelProto) -> None:
    names = [node.name for node in fp32.graph.node]
    assert len(set(names)) == len(names)
    assert "stages.2.encoder.8.layout_gamma_shift/Conv" in names
    layers = {node.name.rpartition("/")[0] for node in fp32.graph.node}
    assert all(layer == "edit" or layer.startswith(("generator", "stages.")) for layer in layers)
    assert str(Path(__file__).parents[1]).encode() not in fp32.SerializeToString()


def test_refine_graph_equals_the_last_stage_of_the_edit_graph(
    fp32: onnx.ModelProto, refine_fp32: onnx.ModelProto
) -> None:
    layers = {node.name.rpartition("/")[0] for node in refine_fp32.graph.node}
    assert "stages.2.encoder.8.layout_gamma_shift" in layers
    assert all(layer == "refine" or layer.startswith("stages.2") for layer in layers)
    whole = {tensor.name: tensor.raw_data for tensor in fp32.graph.initializer}
    for tensor in refine_fp32.graph.initializer:
        if tensor.name.startswith("stages."):
            assert tensor.raw_data == whole[tensor.name]


def test_generator_from_graph_restores_weights_exactly(generator: Generator, fp32: onnx.ModelProto) -> None:
    again = generator_from_graph(GraphFiles(fp32.SerializeToString()), generator.config)
    for name, tensor in generator.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_graph_facts_gflop_equals_that_of_torch(
    generator: Generator, fp32: onnx.ModelProto, fp16: onnx.ModelProto
) -> None:
    for model in (fp32, fp16, store_weights_as_halves(fp32)):
        assert graph_facts(model).gflop == pytest.approx(edit_gflop(generator.config), rel=1e-6)


def test_to_fp16_edit_graph_has_fp16_types(fp16: onnx.ModelProto) -> None:
    facts = graph_facts(fp16)
    assert facts.fp16_share > 0.6
    assert facts.weights_dtype == "float16"
    assert facts.fp32_operations["ReduceMean"] == 2 * 42  # of the instance normalizations
    assert "Conv" not in facts.fp32_operations
    assert "LeakyRelu" not in facts.fp32_operations
    _check_types_of_operations(fp16)


def test_to_fp16_refine_graph_has_fp16_types(refine_fp16: onnx.ModelProto) -> None:
    facts = graph_facts(refine_fp16)
    assert facts.fp16_share > 0.6
    assert facts.fp32_operations["ReduceMean"] == 2 * 16 and "Sqrt" in facts.fp32_operations
    assert "Conv" not in facts.fp32_operations
    _check_types_of_operations(refine_fp16)


def _check_types_of_operations(model: onnx.ModelProto) -> None:
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    for node in model.graph.node:
        if node.op_type in ("ReduceMean", "Sqrt", "Reciprocal"):  # half precision would overflow in sums of squares
            assert types[node.input[0]] == types[node.output[0]] == TensorProto.FLOAT
        if node.op_type == "Conv":
            assert types[node.output[0]] == TensorProto.FLOAT16


def test_store_weights_as_halves_computes_in_fp32_and_saves_space(fp32: onnx.ModelProto) -> None:
    model = store_weights_as_halves(fp32)
    facts = graph_facts(model)
    assert (facts.weights_dtype, facts.fp16_operations) == ("float16", 0)
    assert model.ByteSize() < 0.75 * fp32.ByteSize()


@pytest.mark.parametrize("batch", [1, 3])
def test_edit_graphs_agree_with_torch_within_limits(
    generator: Generator, fp32: onnx.ModelProto, fp16: onnx.ModelProto, batch: int
) -> None:
    edits = _edits(batch)
    expected = TorchSession(generator).run(edits)
    image, mask = edits[0], edits[3]
    for model, precision, limits in (
        (fp32, "fp32", parity.FP32_LIMITS),
        (fp16, "fp16", parity.HALF_LIMITS),
        (store_weights_as_halves(fp32), "fp32", parity.HALF_LIMITS),
    ):
        edited = OnnxRuntimeSession(GraphFiles(model.SerializeToString()), precision).run(edits)
        assert not measure_deviation(edited, expected, mask).problems(limits)
        assert np.array_equal(edited[mask == 0], image[mask == 0])


def test_refine_graphs_from_the_previous_stage_equal_the_edit(
    generator: Generator, refine_fp32: onnx.ModelProto, refine_fp16: onnx.ModelProto
) -> None:
    edits = _edits(2)
    raw: list[torch.Tensor] = []
    hook = generator.stages[1].register_forward_hook(lambda stage, given, image: raw.append(image))
    by_torch = TorchSession(generator)
    expected = by_torch.run_unrounded(edits)
    hook.remove()
    coarse = (raw[0].permute(0, 2, 3, 1).numpy() + 1) * 127.5
    inputs = dict(zip(REFINE_INPUTS, (*edits, coarse), strict=True))
    rounded = np.rint(expected).astype(np.uint8)
    for model, limits in ((refine_fp32, parity.FP32_LIMITS), (refine_fp16, parity.HALF_LIMITS)):
        refined, unrounded = LoadedGraph(GraphFiles(model.SerializeToString()), "refine").run(OUTPUTS, inputs)
        assert not measure_deviation(refined, rounded, edits[3]).problems(limits)
        assert np.array_equal(refined[edits[3] == 0], edits[0][edits[3] == 0])
        lit, expected_lit = (np.rint(made).astype(np.uint8) for made in (unrounded, by_torch.refine(edits, coarse)))
        assert not measure_deviation(lit, expected_lit, edits[3]).problems(limits)


def test_edit_graph_depends_on_labels_instances_and_mask(fp32: onnx.ModelProto) -> None:
    session = OnnxRuntimeSession(GraphFiles(fp32.SerializeToString()), "fp32")
    edits = _edits(1)
    edited = session.run(edits)
    for index in (1, 2):
        changed = list(edits)
        changed[index] = np.roll(edits[index], 37, axis=2)
        assert (session.run(ModelInput(*changed)) != edited).any(), index
    assert (session.run(edits._replace(mask=np.roll(edits.mask, 37, axis=1))) != edited).any()


def test_measure_deviation_ignores_pixels_outside_the_mask() -> None:
    reference = np.full((1, 4, 4, 3), 100, np.uint8)
    image, mask = reference.copy(), np.zeros((1, 4, 4), np.uint8)
    mask[0, 0, :2] = 1
    image[0, 0, 0, 0], image[0, 3, 3] = 94, 0
    deviation = measure_deviation(image, reference, mask)
    assert deviation == Deviation(6, 1.0, pytest.approx(10 * np.log10(255**2 / 6)))
    assert measure_deviation(reference, reference, mask).to_json()["psnr_db"] is None


@pytest.fixture(scope="module")
def on_cpu(street_bundle: Path) -> onnx.ModelProto:
    return onnx.load(street_bundle / "graphs/edit_cpu.fp32.onnx")


def _box(top: int, bottom: int, left: int, right: int) -> np.ndarray:
    mask = np.zeros((256, 256), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


MASKS = {
    "middle": _box(90, 150, 60, 200),
    "one pixel": _box(131, 132, 77, 78),
    "corner": _box(0, 40, 216, 256),
    "other corner": _box(255, 256, 0, 1),
    "a row": _box(101, 102, 0, 256),
    "a side": _box(0, 256, 128, 256),
    "all but one": 1 - _box(3, 4, 3, 4),
    "two far apart": _box(5, 9, 5, 9) | _box(240, 250, 200, 256),
    "nothing": np.zeros((256, 256), np.uint8),
}


@pytest.mark.parametrize("name", MASKS)
def test_cpu_edit_graph_agrees_with_plain_graph_for_any_mask(
    fp32: onnx.ModelProto, on_cpu: onnx.ModelProto, name: str
) -> None:
    edits = _edits(1)._replace(mask=MASKS[name][None])
    plain, restricted = (
        OnnxRuntimeSession(GraphFiles(m.SerializeToString()), "fp32").run(edits) for m in (fp32, on_cpu)
    )
    difference = np.abs(plain.astype(int) - restricted)
    assert difference.max() <= 1
    assert difference.mean() < 1e-3


@pytest.mark.parametrize("name", ["middle", "corner", "a row", "all but one", "nothing"])
def test_cpu_refine_graph_agrees_with_plain_graph(street_bundle: Path, refine_fp32: onnx.ModelProto, name: str) -> None:
    coarse = np.random.default_rng(3).random((1, 128, 128, 3), np.float32) * 255
    edits = dict(zip(REFINE_INPUTS, (*_edits(1), coarse), strict=True)) | {"mask": MASKS[name][None]}
    on_cpu = street_bundle / "graphs/refine_cpu.fp32.onnx"
    for graph in (GraphFiles(refine_fp32.SerializeToString()), on_cpu):
        outputs = LoadedGraph(graph, "refine").run(OUTPUTS, edits)
        if graph is not on_cpu:
            plain = outputs
    assert np.abs(plain[0].astype(int) - outputs[0]).max() <= 1
    assert np.abs(plain[1] - outputs[1]).mean() < 1e-3


def test_cpu_edit_graph_accepts_a_batch_of_different_masks(fp32: onnx.ModelProto, on_cpu: onnx.ModelProto) -> None:
    edits = _edits(3)._replace(mask=np.stack([MASKS[name] for name in ("corner", "nothing", "middle")]))
    plain, restricted = (
        OnnxRuntimeSession(GraphFiles(m.SerializeToString()), "fp32").run(edits) for m in (fp32, on_cpu)
    )
    assert np.abs(plain.astype(int) - restricted).max() <= 1


def test_cpu_edit_graph_omits_most_of_the_layout_branch(fp32: onnx.ModelProto, on_cpu: onnx.ModelProto) -> None:
    # Convolutions whose size depends on the mask are not counted: the remaining ones run for every mask.
    assert graph_facts(on_cpu).gflop < 0.6 * graph_facts(fp32).gflop
    kept = {node.name for node in on_cpu.graph.node if node.op_type == "Conv" and "LeakyRelu" not in node.name}
    assert kept == {node.name for node in fp32.graph.node if node.op_type == "Conv"}


@pytest.mark.parametrize("label", [0, 11, 12, 255])
def test_cpu_edit_graph_accepts_any_class_under_the_mask(
    fp32: onnx.ModelProto, on_cpu: onnx.ModelProto, label: int
) -> None:
    """The first class, the last class and no class, with other classes around the mask."""
    edits = _edits(1)
    edits[1][edits[3] != 0] = label
    plain, restricted = (
        OnnxRuntimeSession(GraphFiles(m.SerializeToString()), "fp32").run(edits) for m in (fp32, on_cpu)
    )
    assert np.abs(plain.astype(int) - restricted).max() <= 1


def test_export_bundle_cpu_only_holds_cpu_graphs_and_verifies(
    generator: Generator,
    fp32: onnx.ModelProto,
    refine_fp32: onnx.ModelProto,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "export_edit", lambda generator: fp32)
    monkeypatch.setattr(pipeline, "export_refine", lambda generator: refine_fp32)
    monkeypatch.setattr(pipeline, "load_checkpoint", lambda path: Checkpoint(generator, "reference", "BGR"))
    save_generator(generator, tmp_path / "g.safetensors")
    options = ExportOptions(class_table("street"), cpu_only=True, half_weights=True)
    bundle = export_bundle(tmp_path / "g.safetensors", tmp_path / "b.spm", options).bundle
    graphs = [(graph.graph, graph.weights_dtype) for graph in bundle.manifest.graphs]
    assert graphs == [(name, "float16") for name in ("edit_cpu", "layout_cpu", "picture_cpu", "refine_cpu")]
    assert (bundle.manifest.channel_order, bundle.manifest.source.format) == ("BGR", "reference")
    assert [name for name in bundle.files() if name.endswith(".weights")] == ["graphs/float16.weights"]
    for open_it in (open_backend, open_torch):
        session = open_it(bundle, device="cpu").session
        results = verify(session, bundle)
        assert len(results) == 6 and all(result.passed for result in results)
    with pytest.raises(BundleError, match=r"no graph 'edit' in fp32.*edit_cpu fp32"):
        open_backend(bundle, device="cuda:0", precision="fp32")
    with pytest.raises(UsageError, match="no graph is left"):
        export_bundle(tmp_path / "g.safetensors", tmp_path / "c.spm", replace(options, precisions=("fp16",)))


def test_export_bundle_graph_over_limits_is_rejected_and_saved(
    generator: Generator, fp32: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(fp32)
    victim = next(tensor for tensor in broken.graph.initializer if tensor.name == "stages.2.to_rgb.weight")
    victim.raw_data = bytes(len(victim.raw_data))
    monkeypatch.setattr(pipeline, "export_edit", lambda generator: broken)
    save_generator(generator, tmp_path / "g.safetensors")
    options = ExportOptions(class_table("street"), precisions=("fp32",))
    with pytest.raises(VerificationError, match=r"edit_cpu fp32 graph.*car_away.*PSNR") as caught:
        export_bundle(tmp_path / "g.safetensors", tmp_path / "b.spm", options)
    kept = tmp_path / "b.spm.edit_cpu.fp32.onnx.rejected"
    assert kept.exists()
    assert str(kept) in str(caught.value.hint)
    assert sorted(path.name for path in tmp_path.iterdir()) == [kept.name, "g.json", "g.safetensors"]


def test_export_bundle_of_ablation_verifies_and_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without context modulation and coarser stages: checks all graphs, and reads the weights back.

    The weights have gradients, with which norms would be exported in their training form.
    """
    torch.manual_seed(3)
    ablation = Generator(GeneratorConfig(12, width=1, hidden=4, modulation="spade", stages=1)).eval()
    initialize(ablation)  # all biases are zero: the exporter keeps one of several equal tensors
    assert {parameter.requires_grad for parameter in ablation.parameters()} == {True}
    save_generator(ablation, tmp_path / "g.safetensors")
    monkeypatch.setattr(pipeline, "load_checkpoint", lambda path: Checkpoint(ablation, "spmdeploy", "RGB"))
    options = ExportOptions(class_table("street"), precisions=("fp32",))
    bundle = export_bundle(tmp_path / "g.safetensors", tmp_path / "b.spm", options).bundle
    facts = bundle.manifest.generator
    assert (facts.modulation, facts.stages) == ("spade", 1)
    assert facts.gflop == pytest.approx(edit_gflop(ablation.config), abs=0.01)
    assert "An ablation: the layout alone modulates" in bundle.read("card.md").decode()
    plain, on_cpu = (onnx.load_from_string(bundle.read(f"graphs/{name}.fp32.onnx")) for name in ("edit", "edit_cpu"))
    assert not any("context" in tensor.name or "stages.1." in tensor.name for tensor in plain.graph.initializer)
    assert graph_facts(on_cpu).gflop < 0.6 * graph_facts(plain).gflop
    edits = _edits(2)
    session = open_backend(bundle, device="cpu").session
    for names in (("corner", "nothing"), ("nothing", "nothing"), ("a side", "other corner"), ("middle", "middle")):
        edits = edits._replace(mask=np.stack([MASKS[name] for name in names]))
        expected = TorchSession(ablation).run(edits)
        assert np.abs(session.run(edits).astype(int) - expected).max() <= 1
    assert np.array_equal(open_torch(bundle, device="cpu").session.run(edits), expected)
    assert not measure_deviation(session.run(edits), expected, edits[3]).problems(parity.FP32_LIMITS)
    graphs = ["edit_cpu", "layout_cpu", "picture_cpu", "edit", "layout", "picture"]
    assert [record.graph for record in bundle.manifest.graphs] == graphs and not session.refines


def test_export_bundle_class_table_of_other_length_is_refused(generator: Generator, tmp_path: Path) -> None:
    save_generator(generator, tmp_path / "g.safetensors")
    with pytest.raises(InputError, match="12 classes, but the class table cityscapes lists 34"):
        export_bundle(tmp_path / "g.safetensors", tmp_path / "b.spm", ExportOptions(class_table("cityscapes")))
    assert not (tmp_path / "b.spm").exists()


def test_export_bundle_manifest_describes_the_files(street_bundle: Path) -> None:
    bundle = open_bundle(street_bundle)
    assert bundle.check_all() == ()
    manifest = bundle.manifest
    graphs = [(graph.graph, graph.precision) for graph in manifest.graphs]
    variants = [("_cpu", "fp32"), ("", "fp32"), ("", "fp16")]
    assert graphs == [
        (name + target, precision)
        for names in (("edit", "layout", "picture"), ("refine",))
        for target, precision in variants
        for name in names
    ]
    assert [edit.name for edit in manifest.golden] == ["car_away", "tree_planted", "crossing_cleared"]
    assert (manifest.channel_order, manifest.native_size, manifest.source.format) == ("RGB", 256, "spmdeploy")
    for record in manifest.graphs:
        facts = graph_facts(onnx.load_from_string(bundle.read(record.file)))
        assert record.fp32_operations == facts.fp32_operations
        assert record.bytes == len(bundle.read(record.file))
    card = bundle.read("card.md").decode()
    assert "0 sky, 1 building" in card
    assert manifest.licence in card
    assert json.loads(bundle.read("manifest.json"))["schema"] == "spmdeploy.bundle/2"


def places(model: onnx.ModelProto) -> dict[str, tuple[str, str]]:
    """File and offset of each large tensor of a graph, by name."""
    entries = {
        tensor.name: {part.key: part.value for part in tensor.external_data} for tensor in model.graph.initializer
    }
    return {name: (entry["location"], entry["offset"]) for name, entry in entries.items() if entry}


def test_export_bundle_shared_weights_are_stored_once(street_bundle: Path, generator: Generator) -> None:
    graphs = {
        path.stem: onnx.load(path, load_external_data=False) for path in (street_bundle / "graphs").glob("*.onnx")
    }
    large = {name for name, tensor in generator.state_dict().items() if tensor.numel() >= ELEMENTS}
    for precision, suffix, dtype in (("fp32", "", "float32"), ("fp16", ".half", "float16")):
        there = places(graphs[f"edit.{precision}"])
        shared = {name + suffix: there[name + suffix] for name in large if name + suffix in there}
        assert shared.keys() == {name + suffix for name in large} or precision == "fp16"  # which has merged ones
        assert {file for file, _ in shared.values()} == {f"{dtype}.weights"}
        last = {name: place for name, place in shared.items() if name.startswith("stages.2.")}
        assert last and last.items() <= places(graphs[f"refine.{precision}"]).items()
        if precision == "fp32":
            assert shared.items() <= places(graphs["edit_cpu.fp32"]).items()
            assert last.items() <= places(graphs["refine_cpu.fp32"]).items()
    bundle = open_bundle(street_bundle)
    assert {record.weights for record in bundle.manifest.graphs} == {"graphs/float32.weights", "graphs/float16.weights"}
    elements = sum(tensor.numel() for name, tensor in generator.state_dict().items() if name in large)
    size = bundle.files()["graphs/float16.weights"]
    assert (
        2 * elements <= size <= 1.25 * 2 * elements
    )  # merged weights are those of the graphs that were written before
    card = bundle.read("card.md").decode()
    assert "| weights of edit fp16, layout fp16, picture fp16, refine fp16 | `graphs/float16.weights` |" in card


def test_weight_store_weights_are_read_back_equal(
    tmp_path: Path, fp32: onnx.ModelProto, on_cpu: onnx.ModelProto
) -> None:
    store = WeightStore(tmp_path / "some.weights")
    for model in (fp32, on_cpu, fp32):
        moved = store.without_weights(model)
        assert moved.ByteSize() < model.ByteSize()
        onnx.save(moved, tmp_path / "graph.onnx")
        again = onnx.load(tmp_path / "graph.onnx")
        for before, after in zip(model.graph.initializer, again.graph.initializer, strict=True):
            assert before.name == after.name
            assert np.array_equal(numpy_helper.to_array(before), numpy_helper.to_array(after))
        assert all(int(start) % ALIGNMENT == 0 for _, start in places(moved).values())


@pytest.mark.slow
def test_export_bundle_accepts_a_checkpoint_of_the_authors(shared: Path, tmp_path: Path) -> None:
    checkpoint = shared / "golden/cityscapes/checkpoint.pth"
    options = ExportOptions(class_table("cityscapes"), precisions=("fp32",), half_weights=True, licence="test only")
    steps: list[str] = []
    result = export_bundle(checkpoint, tmp_path / "city.spm", options, steps.append)
    manifest = result.bundle.manifest
    assert (manifest.channel_order, manifest.source.format, manifest.licence) == ("BGR", "reference", "test only")
    assert manifest.graphs[0].weights_dtype == "float16"
    assert steps[0].startswith("reading") and steps[-1] == "writing the bundle" and len(steps) == 11
    assert [path.name for path in tmp_path.iterdir()] == ["city.spm"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_exported_refine_graphs_build_as_tensorrt_rtx_engines(street_bundle: Path, precision: str) -> None:
    """The `edit` graphs are built in tests/integration/test_rtx_engines.py."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: engines cannot be built here")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(street_bundle / f"graphs/refine.{precision}.onnx"))
    assert parsed, [parser.get_error(index).desc() for index in range(parser.num_errors)]
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for index in range(network.num_inputs):
        value = network.get_input(index)
        rest = tuple(value.shape)[1:]
        profile.set_shape(value.name, (1, *rest), (1, *rest), (8, *rest))
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    assert engine.nbytes > 1_000_000
