"""Train with Lightning: the optimizer is made in ``configure_optimizers``, and a callback writes the report.

pip install . lightning
python examples/front_ends/lightning_module.py --folder out --max_steps 50
python examples/front_ends/lightning_module.py --folder out --max_steps 100 --resume out/last.ckpt
hf-lowmem-optim report out --html report.html
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from hf_lowmem_optim import OptimizerFactory
from hf_lowmem_optim.integrations.lightning import OptimizerStateReport
from hf_lowmem_optim.trainer.demo import demo_model, documentation


class LanguageModel(LightningModule):
    """A small byte-level Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.model = demo_model()

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """Return the loss of a batch of bytes."""
        loss = self.model(input_ids=batch[0], labels=batch[0]).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule, as with any other."""
        optimizer = OptimizerFactory("ldadam", lr=4e-3, rank=16, weight_decay=0.01)(self.model)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    """Train, from the beginning or from a checkpoint."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", default="out")
    parser.add_argument("--max_steps", type=int, default=50)
    parser.add_argument("--save_steps", type=int, default=25)
    parser.add_argument("--resume", metavar="CHECKPOINT")
    args = parser.parse_args()
    seed_everything(0)
    training_set, _ = documentation()
    checkpoint = ModelCheckpoint(args.folder, save_last=True, every_n_train_steps=args.save_steps)
    trainer = Trainer(
        max_steps=args.max_steps,
        default_root_dir=args.folder,
        callbacks=[checkpoint, OptimizerStateReport()],
        log_every_n_steps=1,
        logger=False,
    )
    trainer.fit(LanguageModel(), DataLoader(training_set, batch_size=8), ckpt_path=args.resume)


if __name__ == "__main__":
    main()
