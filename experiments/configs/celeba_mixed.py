"""Margin softmax and triplets together on CelebA's 9,058 training people, from the network of celeba_triplet, for two CPU cores.

    python -m experiments.train --config=experiments/configs/celeba_mixed.py --data_dir=data \
        --config.init=runs/celeba_triplet/weights.safetensors --workdir=runs/celeba_mixed

From scratch the margin softmax alone stood still for its first 650 steps (validation 0.61): nine thousand random class centres say little about faces. Started
from triplets, its centres have something to gather around. Not yet run to its end, so there is no row for it.
"""

from ml_collections import ConfigDict

from experiments.configs import celeba_triplet


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is not used here."""
    config = celeba_triplet.get_config(arg)
    config.steps = 2600
    config.batch.update(people=36, images_per_person=4)
    config.model.dropout = 0.1
    config.triplet.update(weight=1.0, margin=0.2)
    config.softmax.update(weight=1.0, scale=24.0, margin=0.2)
    config.optimizer.update(learning_rate=1e-3, warmup=100, clip=20.0)
    config.evaluation.distance = "cosine"
    return config
