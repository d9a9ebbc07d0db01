"""Exports a checkpoint as a bundle: golden edits, FP32 and FP16 graphs, each checked before it is included."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

from spmdeploy.assets.samples import ATTRIBUTION
from spmdeploy.backends.pytorch import TorchSession, bundled_generator
from spmdeploy.backends.verify import GoldenResult, GoldenSample
from spmdeploy.bundle.bundle import Bundle, is_bundle, open_bundle
from spmdeploy.bundle.manifest import (
    EDIT,
    ON_CPU,
    PARTS,
    REFINE,
    GeneratorFacts,
    GoldenEdit,
    GraphRecord,
    Manifest,
    ParityLimits,
    SourceFacts,
)
from spmdeploy.bundle.writer import BundleWriter
from spmdeploy.errors import InputError, UsageError, VerificationError
from spmdeploy.export.card import bundle_card
from spmdeploy.export.cpu import specialize_for_mask
from spmdeploy.export.external_data import WeightStore
from spmdeploy.export.fp16 import store_weights_as_halves, to_fp16
from spmdeploy.export.golden import golden_edits
from spmdeploy.export.gpu import order_weights, specialize_for_gpu
from spmdeploy.export.graph_stats import GraphFacts, graph_facts
from spmdeploy.export.onnx import export_edit, export_refine
from spmdeploy.export.parity import FP32_LIMITS, HALF_LIMITS, check_graph, check_parts, worst_case
from spmdeploy.export.split import split_by_layout
from spmdeploy.files import sha256
from spmdeploy.imaging import files as images
from spmdeploy.inputs import regular_file
from spmdeploy.labels import ClassTable
from spmdeploy.model.checkpoint import Checkpoint, load_checkpoint
from spmdeploy.model.generator import Generator
from spmdeploy.types import NATIVE_SIZE, Precision, WeightsDtype
from spmdeploy.version import __version__

UNSTATED_LICENCE = "not stated at export"


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export."""

    table: ClassTable | None
    """None: the table of the bundle that is exported again."""
    precisions: Sequence[Precision] = ("fp32", "fp16")
    half_weights: bool = False
    """Store the FP32 graph's weights rounded to FP16: half the file, FP32 arithmetic, larger deviation."""
    cpu_only: bool = False
    """Write only the graphs for CPUs: half the bundle, but not usable on a GPU."""
    licence: str | None = None
    """Terms of the weights; None: those of the bundle that is exported again."""
    overwrite: bool = False


@dataclass(frozen=True)
class ExportedGraph:
    """A graph that passed its checks, and the seconds that its export took."""

    record: GraphRecord
    seconds: float


@dataclass(frozen=True)
class Export:
    """The outcome of `export_bundle`."""

    bundle: Bundle
    graphs: tuple[ExportedGraph, ...]
    seconds: float


def export_bundle(
    checkpoint: Path, output: Path, options: ExportOptions, progress: Callable[[str], None] = lambda step: None
) -> Export:
    """Write a bundle from the weights of a checkpoint or of another bundle.

    Args:
        checkpoint: A .safetensors or .pth file, or a bundle.
        output: The bundle to write.
        options: Precisions, classes and license.
        progress: Called with the name of each step when it begins.

    Raises:
        InputError: Weights and classes do not fit together, or a file cannot be used.
        UsageError: The options contradict each other, or no class table is known.
        VerificationError: A graph deviates from PyTorch by more than its limits; it is saved next to `output` as
            `*.rejected`, and no bundle is written.
    """
    started = time.perf_counter()
    with BundleWriter(output, options.overwrite) as writer:
        progress(f"reading {checkpoint.name}")
        weights, source = _read_source(checkpoint)
        table = source.classes if options.table is None else options.table
        if table is None:
            raise UsageError(f"{checkpoint} does not list its classes", "name a class table with --classes")
        _check_classes(weights, table, checkpoint)
        progress("making the golden edits with torch")
        golden = golden_edits(TorchSession(weights.generator), table)

        graphs, gflop, limits, stores = [], {}, {}, _ExternalDataFiles(writer)
        variants = _wanted_variants(options)
        for graph, trace in _traces(weights.generator).items():
            progress(f"tracing the {graph} graph")
            exported = time.perf_counter()
            fp32 = trace(weights.generator)
            order_weights(fp32)
            gflop[graph] = graph_facts(fp32).gflop
            for precision, on_cpu in variants:
                name = ON_CPU[graph] if on_cpu else graph
                progress(f"writing and checking the {name} {precision} graph")
                model, limits[precision] = _variant(fp32, precision, on_cpu, options.half_weights)
                record = _write_graph(writer, stores, name, model, precision, golden, limits[precision])
                graphs.append(ExportedGraph(record, time.perf_counter() - exported))
                exported = time.perf_counter()
                if name in PARTS:
                    progress(f"splitting the {name} {precision} graph")
                    parts = _write_parts(writer, stores, record, model, golden, limits[precision])
                    seconds = time.perf_counter() - exported
                    graphs += [ExportedGraph(part, seconds / 2) for part in parts]
                    exported = time.perf_counter()

        progress("writing the bundle")
        _write_golden(writer, golden)
        manifest = Manifest(
            name=_bundle_name(output),
            created=date.today(),
            tools=_tool_versions(),
            classes=table,
            channel_order=weights.color_order,
            native_size=NATIVE_SIZE,
            generator=_generator_facts(weights, gflop[EDIT]),
            graphs=tuple(graph.record for graph in graphs),
            golden=tuple(GoldenEdit(name, f"golden/{name}", ATTRIBUTION) for name in golden),
            limits=limits,
            source=source.facts,
            licence=options.licence or source.licence or UNSTATED_LICENCE,
            training=weights.training,
        )
        writer.add_bytes("card.md", bundle_card(manifest, stores.sizes()).encode())
        bundle = writer.finish(manifest)
    return Export(bundle, tuple(graphs), time.perf_counter() - started)


@dataclass(frozen=True)
class _Source:
    """Origin of the weights, with the classes and license of a bundle."""

    facts: SourceFacts
    classes: ClassTable | None = None
    licence: str | None = None


def _read_source(path: Path) -> tuple[Checkpoint, _Source]:
    """The weights of a checkpoint or of a bundle. Raises InputError, BundleError."""
    path = regular_file(path)
    if is_bundle(path):
        bundle = open_bundle(path)
        manifest = bundle.manifest
        weights = Checkpoint(bundled_generator(bundle), "spmdeploy", manifest.channel_order, manifest.training)
        return weights, _Source(manifest.source, manifest.classes, manifest.licence)
    weights = load_checkpoint(path)
    with open(regular_file(path), "rb") as stream:
        return weights, _Source(SourceFacts(path.name, sha256(stream), weights.format))


def _check_classes(weights: Checkpoint, table: ClassTable, path: Path) -> None:
    classes = weights.generator.config.classes
    if classes != len(table):
        raise InputError(
            f"{path}: the generator knows {classes} classes, but the class table {table.name} lists {len(table)}",
            "give the table it was trained with: --classes cityscapes (34), ade20k (151) or a JSON file of your own",
        )


def _traces(generator: Generator) -> dict[str, Callable[[Generator], onnx.ModelProto]]:
    """The export function of each graph of the generator, by the name of the graph."""
    refine = {REFINE: export_refine} if generator.config.stages > 1 else {}
    return {EDIT: export_edit, **refine}


def _wanted_variants(options: ExportOptions) -> list[tuple[Precision, bool]]:
    """Precision of each variant of a graph, and whether it is the one for CPUs; the fastest to export first.

    The graphs for CPUs are in FP32.
    """
    variants: list[tuple[Precision, bool]] = []
    if "fp32" in options.precisions:
        variants += [("fp32", True)] if options.cpu_only else [("fp32", True), ("fp32", False)]
    if "fp16" in options.precisions and not options.cpu_only:
        variants.append(("fp16", False))
    if not variants:
        raise UsageError("no graph is left to write", "CPUs compute in FP32: leave out the fp16 precision or cpu_only")
    return variants


def _variant(
    fp32: onnx.ModelProto, precision: Precision, on_cpu: bool, half_weights: bool
) -> tuple[onnx.ModelProto, ParityLimits]:
    """The graph in that precision, and the limits of its deviation."""
    if precision == "fp16":
        return to_fp16(specialize_for_gpu(fp32)), HALF_LIMITS
    model = specialize_for_mask(fp32) if on_cpu else fp32
    return (store_weights_as_halves(model), HALF_LIMITS) if half_weights else (model, FP32_LIMITS)


class _ExternalDataFiles:
    """The external data files of a bundle, one per type of the stored weights."""

    def __init__(self, writer: BundleWriter) -> None:
        self._writer = writer
        self._stores: dict[str, WeightStore] = {}

    def of(self, dtype: WeightsDtype) -> tuple[str, WeightStore]:
        """The file's name in the bundle, and its writer."""
        name = f"graphs/{dtype}.weights"
        if name not in self._stores:
            self._stores[name] = WeightStore(self._writer.path(name))
        return name, self._stores[name]

    def sizes(self) -> dict[str, int]:
        return {name: self._writer.path(name).stat().st_size for name in self._stores}


def _write_graph(
    writer: BundleWriter,
    stores: _ExternalDataFiles,
    graph: str,
    model: onnx.ModelProto,
    precision: Precision,
    golden: Mapping[str, GoldenSample],
    limits: ParityLimits,
) -> GraphRecord:
    name = f"graphs/{graph}.{precision}.onnx"
    path = writer.path(name)
    facts = graph_facts(model)
    weights, store = stores.of(facts.weights_dtype)
    onnx.save(store.without_weights(model), path)
    results = check_graph(path, EDIT if graph in (EDIT, ON_CPU[EDIT]) else REFINE, golden, limits)
    problems = [f"{result.name}: {problem}" for result in results for problem in result.problems]
    if problems:
        onnx.save(model, path)  # with its weights, as their file is removed
        kept = writer.save_rejected(name)
        raise VerificationError(
            f"the {graph} {precision} graph deviates from PyTorch: {'; '.join(problems)}",
            f"it was kept as {kept}; if the weights are sound, this is a defect worth reporting",
        )
    return _record(writer, graph, precision, name, weights, facts, results)


def _write_parts(
    writer: BundleWriter,
    stores: _ExternalDataFiles,
    whole: GraphRecord,
    model: onnx.ModelProto,
    golden: Mapping[str, GoldenSample],
    limits: ParityLimits,
) -> list[GraphRecord]:
    """Write the two parts of an edit graph, which share its weights, and compare them with PyTorch as a pair."""
    weights, store = stores.of(whole.weights_dtype)
    partition = split_by_layout(model)
    layout, picture = PARTS[whole.graph]
    graphs = {layout: partition.layout, picture: partition.picture}
    names = {graph: f"graphs/{graph}.{whole.precision}.onnx" for graph in graphs}
    for graph, part in graphs.items():
        onnx.save(store.without_weights(part), writer.path(names[graph]))
    results = check_parts(writer.path(names[layout]), writer.path(names[picture]), golden, limits)
    problems = [f"{result.name}: {problem}" for result in results for problem in result.problems]
    if problems:
        raise VerificationError(
            f"the parts of the {whole.graph} {whole.precision} graph deviate from PyTorch: {'; '.join(problems)}",
            "if the weights are sound, this is a defect worth reporting",
        )
    return [
        _record(writer, graph, whole.precision, names[graph], weights, graph_facts(part), results)
        for graph, part in graphs.items()
    ]


def _record(
    writer: BundleWriter,
    graph: str,
    precision: Precision,
    name: str,
    weights: str,
    facts: GraphFacts,
    results: list[GoldenResult],
) -> GraphRecord:
    size, digest = writer.measure(name)
    return GraphRecord(
        graph=graph,
        precision=precision,
        file=name,
        bytes=size,
        sha256=digest,
        opset=facts.opset,
        weights_dtype=facts.weights_dtype,
        fp16_share=round(facts.fp16_share, 4),
        fp32_operations=facts.fp32_operations,
        parity=worst_case(results),
        weights=weights,
    )


def _write_golden(writer: BundleWriter, golden: Mapping[str, GoldenSample]) -> None:
    for name, sample in golden.items():
        for image, array in (
            ("image", sample.inputs.image[0]),
            ("labels", sample.inputs.labels[0]),
            ("mask", (sample.inputs.mask[0] * 255).astype(np.uint8)),
            ("expected", sample.expected[0]),
            ("refined", None if sample.refined is None else sample.refined[0]),
        ):
            if array is not None:
                images.write_image(writer.path(f"golden/{name}/{image}.png"), array)


def _generator_facts(weights: Checkpoint, gflop: float) -> GeneratorFacts:
    config = weights.generator.config
    parameters = sum(parameter.numel() for parameter in weights.generator.parameters())
    return GeneratorFacts(
        config.classes, config.width, config.hidden, parameters, round(gflop, 2), config.modulation, config.stages
    )


def _bundle_name(output: Path) -> str:
    return output.name.removesuffix(".zip").removesuffix(".spm")


def _tool_versions() -> dict[str, str]:
    return {
        "spmdeploy": __version__,
        "torch": str(torch.__version__),
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
