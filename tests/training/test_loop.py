from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from spmdeploy.errors import SpmDeployError
from spmdeploy.networks.weights import load_checkpoint
from spmdeploy.training.config import LossConfig, Phase, TrainConfig, to_json
from spmdeploy.training.loop import Trainer, train
from spmdeploy.training.run_state import RunDirectory

LOSSES = ("discriminator", "l1", "adversarial")

# Runs in a process of its own: trains with the configuration given as a file, prints every record.
SCRIPT = """
import json, sys, torch
from pathlib import Path
from spmdeploy.training.config import from_json
from spmdeploy.training.loop import train
torch.set_num_threads(1)
config, output, resume = from_json(json.loads(Path(sys.argv[1]).read_text()), "given"), Path(sys.argv[2]), sys.argv[3]
train(config, output, resume == "resume", lambda record: print(json.dumps(record), flush=True))
"""


def losses(run: Path) -> list[tuple[float, ...]]:
    lines = [line for line in RunDirectory(run).metrics() if line["kind"] == "train"]
    assert [line["images"] for line in lines] == sorted({line["images"] for line in lines})
    return [tuple(line[name] for name in LOSSES) for line in lines]


def silently(record: dict[str, Any]) -> None:
    pass


def arguments(tmp_path: Path, config: TrainConfig, output: Path, mode: str) -> list[str]:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "given.json").write_text(json.dumps(to_json(config)))
    return [str(tmp_path / "train.py"), str(tmp_path / "given.json"), str(output), mode]


def environment() -> dict[str, str]:
    root = Path(__file__).resolve().parents[2]
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, tiny: TrainConfig) -> None:
    """SIGKILL twice, in different phases; the losses are those of a run that was never interrupted."""
    config = dataclasses.replace(tiny, checkpoint_seconds=0)  # after every step
    train(config, tmp_path / "whole", False, silently)
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
    train(config, tmp_path / "killed", True, silently)
    assert losses(tmp_path / "killed") == wanted
    exports = [load_checkpoint(tmp_path / name / "export" / "generator.safetensors") for name in ("whole", "killed")]
    first, second = (export.generator.state_dict() for export in exports)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_two_processes_give_the_losses_of_one(tmp_path: Path, tiny: TrainConfig) -> None:
    train(tiny, tmp_path / "one", False, silently)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, *arguments(tmp_path, tiny, tmp_path / "two", "start")]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert finished.returncode == 0, finished.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 6
    for single, split in zip(one, two, strict=True):
        assert split == pytest.approx(single, rel=1e-3, abs=1e-4)


def test_a_phase_leaves_the_stages_before_it_alone(tmp_path: Path, tiny: TrainConfig) -> None:
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


def test_rates_fall_at_the_end_of_a_phase(tmp_path: Path, tiny: TrainConfig) -> None:
    phase = Phase((0,), images=8, batch=2, generator_rate=1e-3, discriminator_rate=1e-3, decay_from=0.5)
    config = dataclasses.replace(tiny, schedule=(phase,))
    trainer = Trainer(config, RunDirectory(tmp_path), torch.device("cpu"))
    rates = []
    for _ in range(4):
        trainer.step()
        rates.append(trainer._generator_optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1] == rates[2] == 1e-3
    assert rates[3] == pytest.approx(1e-3 * (1 - 0.95 / 2))


def test_divergence_stops_with_the_last_good_checkpoint(tmp_path: Path, tiny: TrainConfig) -> None:
    run = RunDirectory(tmp_path / "run")
    run.start(tiny)
    trainer = Trainer(tiny, run, torch.device("cpu"))
    trainer.step()
    trainer.save()
    with torch.no_grad():
        trainer.generator.stages[0].to_rgb.weight.fill_(float("nan"))
    with pytest.raises(SpmDeployError, match="loss is nan at step 1, after 2 images") as caught:
        trainer.train(silently)
    assert "checkpoint.pt" in (caught.value.hint or "")
    resumed = Trainer(tiny, run, torch.device("cpu"))
    resumed.resume()
    assert resumed.progress.images == 2
    assert all(value.isfinite().all() for value in resumed.generator.parameters())


def test_a_tiny_model_learns_its_pictures(tmp_path: Path, tiny: TrainConfig) -> None:
    """`make train-smoke` in a reduced form: the error on six toy streets falls to less than half in 50 steps."""
    phase = Phase((0,), images=200, batch=4, generator_rate=5e-3, discriminator_rate=1e-3)
    config = dataclasses.replace(
        tiny, schedule=(phase,), width=4, hidden=8, loss=LossConfig(perceptual=0, adversarial=0.05, l1_inside=5)
    )
    trainer = Trainer(config, RunDirectory(tmp_path), torch.device("cpu"))
    found = [trainer.step()["l1"] for _ in range(50)]
    assert sum(found[-10:]) < 0.5 * sum(found[:10])
