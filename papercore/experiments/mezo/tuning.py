"""Learning rates of the quick chapter, chosen on other seeds and other sentences than those that are reported.

    python -m papercore.experiments.mezo.tuning

writes `tuning.json` beside this file: a record with the whole sweep and the rate of each arm. The quick run reads only the rates.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from papercore.experiments.mezo.arms import ARMS, FT_GRID, few_shot, fine_tune, run_mezo, test_sentences
from papercore.experiments.mezo.config import QuickConfig
from papercore.experiments.mezo.quick import TUNING, pretrained, with_weights
from papercore.lab.progress import progress
from papercore.lab.record import Record
from papercore.lab.stages import Stages

SEEDS = (900_001, 900_002, 900_003)
# A model of its own: not even the pretrained weights are shared with the runs that are reported.
MODEL_SEED = 900_000


def tune(config: QuickConfig) -> Record:
    """Try every learning rate of every arm; keep the best accuracy on held-out sentences, averaged along the curve; at ties the lower training loss."""
    record = Record.start(config)
    stages = Stages.of(config.replace(seed=900))
    weights = pretrained(config, MODEL_SEED, stages)
    model, untrained = (
        with_weights(config, MODEL_SEED, weights[max(weights)]),
        with_weights(config, MODEL_SEED, weights[0]),
    )
    held_out = test_sentences(config.tests // 2, MODEL_SEED)
    k = max(config.shots)
    eval_at = [round(config.steps * share) for share in (1 / 6, 1 / 3, 2 / 3, 1)]
    rows: list[list[Any]] = []
    for arm in progress([a for a in ARMS.values() if a.grid], "tuning"):
        start = model if arm.pretrained else untrained
        scores = {}
        for lr in arm.grid:
            done = []
            for s in SEEDS:
                try:
                    done.append(
                        run_mezo(
                            start,
                            arm,
                            lr,
                            few_shot(k, s),
                            held_out,
                            steps=config.steps,
                            seed=s,
                            eval_at=eval_at,
                        )
                    )
                except FloatingPointError:
                    done.append({"area": 0.0, "losses": [float("inf")]})
            scores[lr] = (
                float(np.mean([r["area"] for r in done])),
                -float(np.mean([r["losses"][-1] for r in done])),
            )
            rows.append([arm.name, lr, scores[lr][0], -scores[lr][1], len(done)])
        record.metric(f"lr_{arm.name}", max(arm.grid, key=lambda lr: scores[lr]), "exact")
    finals = {
        lr: float(
            np.mean(
                [
                    fine_tune(model, lr, few_shot(k, s), held_out, steps=config.backprop_steps, seed=s)[
                        "final"
                    ]
                    for s in SEEDS
                ]
            )
        )
        for lr in FT_GRID
    }
    rows += [["ft", lr, score, None, len(SEEDS)] for lr, score in finals.items()]
    record.metric("lr_ft", max(finals, key=lambda lr: finals[lr]), "exact")
    record.table("sweep", ["arm", "lr", "held-out accuracy", "training loss", "seeds"], rows)
    record.note(
        "seeds", f"few-shot seeds {SEEDS}, model seed {MODEL_SEED}: none of them is used by a reported run"
    )
    return record.finish()


if __name__ == "__main__":
    made = tune(QuickConfig.quick())
    made.save(TUNING)
    for row in made.tables["sweep"]["rows"]:
        print(*row)
    print(made.metrics, f"{made.provenance['seconds']:.0f} s")
