"""Reads facts about a bundle, an engine or a checkpoint from the files themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spmdeploy.bundle.bundle import Bundle, open_bundle
from spmdeploy.engines.record import BUILD_AGAIN, ENGINE_SUFFIX
from spmdeploy.engines.store import check_engine, find_engines
from spmdeploy.errors import BundleError, InputError, UnavailableError
from spmdeploy.model import is_checkpoint


def inspect_path(path: Path) -> dict[str, Any]:
    """Return facts about a bundle (folder or zip), an engine (.engine) or a checkpoint (.pth, .safetensors).

    Returns:
        JSON values; `kind` is bundle, engine or checkpoint.

    Raises:
        BundleError: It is none of them, or a corrupt bundle or engine.
        InputError: It is a corrupt checkpoint, or missing.
        UnavailableError: It is a checkpoint, and torch is not installed.
    """
    if not path.exists():
        raise InputError(f"there is no {path}", "give a bundle, an engine or a checkpoint")
    if path.is_file() and is_checkpoint(path):
        return _checkpoint_facts(path)
    if path.is_file() and path.suffix.lower() == ENGINE_SUFFIX:
        return _engine_facts(path)
    return _bundle_facts(open_bundle(path))


def _bundle_facts(bundle: Bundle) -> dict[str, Any]:
    unlisted = bundle.check_all()
    manifest = bundle.manifest.to_json()
    sizes = bundle.files()
    for graph in manifest["graphs"]:
        graph["counted"] = _counted(bundle, graph["file"])
    engines = [engine.to_json() for engine in find_engines(bundle)]
    facts = {"kind": "bundle", "path": str(bundle.path), "bytes": sum(sizes.values()), "surplus": unlisted}
    return {**facts, "signed": bundle.read_signature() is not None, "engines": engines, **manifest}


def _engine_facts(path: Path) -> dict[str, Any]:
    engine = check_engine(path)
    if engine.problems:
        raise BundleError(f"{path}: {'; '.join(engine.problems)}", BUILD_AGAIN)
    return {"kind": "engine", **engine.to_json()}


def _counted(bundle: Bundle, file: str) -> dict[str, Any] | None:
    """Precision and work counted in the graph; None if the onnx package is missing."""
    try:
        import onnx

        from spmdeploy.export.graph_stats import graph_facts
    except ImportError:
        return None
    content = bundle.read(file)
    try:
        facts = graph_facts(onnx.load_from_string(content))
    except Exception as exc:  # onnx and protobuf raise anything on bytes that are no graph
        raise BundleError(
            f"{bundle.path / file}: not a graph of spmdeploy: {exc!r}", "export the bundle again"
        ) from exc
    return {
        "nodes": facts.nodes,
        "gflop": round(facts.gflop, 2),
        "fp16_share": round(facts.fp16_share, 4),
        "fp16_operations": facts.fp16_operations,
        "fp32_operations": facts.fp32_operations,
        "weights_dtype": facts.weights_dtype,
    }


def _checkpoint_facts(path: Path) -> dict[str, Any]:
    try:
        from spmdeploy.model.checkpoint import load_checkpoint
        from spmdeploy.model.flops import edit_gflop
    except ImportError as exc:
        raise UnavailableError(f"{path} is a checkpoint, and {exc.name} is not installed", _EXTRA) from exc
    checkpoint = load_checkpoint(path)
    config = checkpoint.generator.config
    return {
        "kind": "checkpoint",
        "path": str(path),
        "format": checkpoint.format,
        "channel_order": checkpoint.color_order,
        "classes": config.classes,
        "width": config.width,
        "hidden": config.hidden,
        "modulation": config.modulation,
        "stages": config.stages,
        "parameters": sum(parameter.numel() for parameter in checkpoint.generator.parameters()),
        "gflop": round(edit_gflop(config), 2),
    }


_EXTRA = 'pip install "spmdeploy[export]"'
