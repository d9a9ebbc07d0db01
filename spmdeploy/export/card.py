"""Writes the model card (card.md) of a bundle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from spmdeploy.bundle.manifest import GeneratorFacts, GraphRecord, Manifest


def bundle_card(manifest: Manifest, sizes: Mapping[str, int]) -> str:
    """Return the card as Markdown.

    Args:
        manifest: The manifest of the bundle.
        sizes: Size in bytes of each external data file.
    """
    generator = manifest.generator
    sections = [
        f"# {manifest.name}",
        "An SPM semantic image editor. It takes a photo, a label map and a mask, and repaints the pixels under the "
        f"mask with the classes of the label map. {generator.parameters / 1e6:.1f} M parameters, {generator.gflop:.1f} "
        f"GFLOP for one {manifest.native_size}×{manifest.native_size} edit." + _ablations(generator),
        f"**Licence of the weights:** {manifest.licence}",
        f"**Made from** `{manifest.source.file}` (SHA-256 `{manifest.source.sha256[:16]}…`) on {manifest.created} with "
        + ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items())
        + ".",
        "## Graphs",
        "Deviations from PyTorch in FP32, under the mask, in gray levels (0..255); the largest of the golden edits.",
        "| graph | file | MB | FP16 share | largest deviation | mean deviation | PSNR |\n"
        + "|---" * 7
        + "|\n"
        + "\n".join([*map(_graph_row, manifest.graphs), *_weights_rows(manifest, sizes)]),
        "## Classes",
        ", ".join(f"{entry.id} {entry.name}" for entry in manifest.classes.classes)
        + ("." if manifest.classes.void_id is None else f"; {manifest.classes.void_id} is void."),
        "## Golden edits",
        "\n".join(f"- `{edit.folder}`: {edit.note}" for edit in manifest.golden),
    ]
    if manifest.training:
        facts = "\n".join(f"- {name}: {value}" for name, value in manifest.training.items())
        sections += ["## Training", facts]
    return "\n\n".join(sections) + "\n"


def _ablations(generator: GeneratorFacts) -> str:
    """A sentence about parts of the paper's design that the generator lacks, or nothing."""
    ablations = []
    if generator.modulation == "spade":
        ablations.append("the layout alone modulates the features (SPADE)")
    if generator.stages == 1:
        ablations.append("there is one stage, at full size")
    return f" An ablation: {' and '.join(ablations)}." if ablations else ""


def _weights_rows(manifest: Manifest, sizes: Mapping[str, int]) -> Iterator[str]:
    for name, size in sizes.items():
        graphs = ", ".join(f"{record.graph} {record.precision}" for record in manifest.graphs if record.weights == name)
        yield f"| weights of {graphs} | `{name}` | {size / 1e6:.1f} | | | | |"


def _graph_row(record: GraphRecord) -> str:
    psnr = "∞" if record.parity["psnr_db"] is None else f"{record.parity['psnr_db']:.1f} dB"
    return (
        f"| {record.graph} {record.precision} | `{record.file}` | {record.bytes / 1e6:.1f} | {record.fp16_share:.0%} "
        f"| {record.parity['max_grey']:g} | {record.parity['mean_grey']:.3f} | {psnr} |"
    )
