"""The paper's batch on the network the field uses: Inception-ResNet-v1, 160x160, bfloat16, AdaGrad, for accelerators.

1,920 faces a step: 48 people with 40 images each (the paper: about 1,800, about 40 of a person), which 1, 2, 4 ... 128 devices share evenly.

    python -m experiments.train --config=experiments/configs/facenet.py --config.data.records=faces --data_dir=data --workdir=runs/facenet
    python -m experiments.aot_compile --config=experiments/configs/facenet.py --topology=v5e:4x4

Never trained here: no accelerator was at hand. The second line says what a step would cost on a TPU (docs/tpu.md).
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is not used here."""
    config = base.get_config(arg)
    config.steps = 100_000
    config.model.update(name="inception_resnet_v1", size=160, embedding_size=128, dtype="bfloat16")
    config.data.workers = 8
    config.batch.update(people=48, images_per_person=40)
    config.triplet.update(rule="semi_hard", margin=0.2)
    config.optimizer.update(name="adagrad", learning_rate=0.05, moving_average=0.9999)
    config.evaluate_every = 5000
    return config
