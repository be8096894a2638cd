"""Softmax with a cosine margin on CelebA's 9,058 training people, for two CPU cores.

python -m experiments.train --config=experiments/configs/celeba_softmax.py --data_dir=data --workdir=runs/celeba_softmax
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is not used here."""
    config = base.get_config(arg)
    config.steps = 5000
    config.data.records = "celeba"
    config.data.sampler = "shuffle"
    config.batch.update(people=32, images_per_person=4)
    config.transforms.update(crop=112, shift=5, zoom=0.08, flip=True, rotation=5.0, brightness=0.15, contrast=0.2, grey=0.1)
    config.triplet.weight = 0.0
    config.softmax.update(weight=1.0, scale=24.0, margin=0.2)
    config.model.update(size=48, dropout=0.2)
    config.optimizer.update(name="adam_small_epsilon", learning_rate=1.5e-3, schedule="cosine", warmup=200, clip=20.0, moving_average=0.998)
    config.evaluate_every = 1000
    config.evaluation.update(flip=True, distance="cosine")
    return config
