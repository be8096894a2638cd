"""Triplets after softmax, on CelebA's 9,058 training people, for two CPU cores: LFW 0.8965 ± 0.0047, VAL 0.245; the second half, from
the network of celeba_softmax; 360,000 images, 33 minutes on a shared machine.

    python -m experiments.train --config=experiments/configs/celeba_softmax_triplet.py --data_dir=data \
        --config.init=runs/celeba_softmax/weights.safetensors --workdir=runs/celeba_softmax_triplet
"""

from ml_collections import ConfigDict

from experiments.configs import celeba_triplet


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is not used here."""
    config = celeba_triplet.get_config(arg)
    config.steps = 2000
    return config
