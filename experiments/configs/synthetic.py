"""The default: drawn people, triplet loss, two CPU cores, no download.

python -m experiments.train
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is not used here."""
    config = base.get_config(arg)
    config.steps = 480
    config.data.update(records="synthetic", synthetic_people=400)
    config.batch.update(people=24, images_per_person=4)
    config.model.size = 48
    config.triplet.update(rule="semi_hard", margin=0.2)
    config.optimizer.update(name="adam_small_epsilon", learning_rate=1e-3, schedule="cosine", warmup=50, clip=1.0, moving_average=0.99)
    config.checkpoint_every = 100
    config.evaluate_every = 200
    return config
