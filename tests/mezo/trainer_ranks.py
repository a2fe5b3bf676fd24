"""What each of two processes runs under torchrun: MeZOTrainer on its shard of every batch (test_distributed.py)."""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.mezo.test_integrations import tiny, trainer_of


def main() -> None:
    folder = Path(sys.argv[1])
    trainer = trainer_of(tiny(), folder, steps=4, mezo={"eps": 0.05}, ddp_backend="gloo")
    trainer.train()
    rank = dist.get_rank()
    result = {
        "weights": [p.detach().flatten().tolist() for p in trainer.model.parameters()],
        "slopes": trainer.mezo_optimizer.log.projected_grads.tolist(),
    }
    (folder / f"trainer{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
