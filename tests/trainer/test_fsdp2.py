"""The Trainer with accelerate's FSDP2 in two processes: train, save in full and in parts, resume."""

from __future__ import annotations

from pathlib import Path

from tests.sharding.processes import launch


def test_the_trainer_shards_saves_and_resumes(tmp_path: Path) -> None:
    here, there = launch([("tests.trainer.fsdp2_jobs:train_and_resume", 2)], tmp_path, timeout=240)[0]
    assert here.keys() == {"ldadam", "microadam", "sparse_mfac"}
    for found in (here, there):
        for optim, (same, steps, predicted) in found.items():
            assert same and steps == {4}, optim
            assert found is there or (predicted and all(predicted)), optim
