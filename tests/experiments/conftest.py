"""A run small enough to repeat: drawn people, a network of a few thousand values."""

import pytest

from data_pipelines import images, records, synthetic
from experiments.configs import base


@pytest.fixture(scope="session")
def people(tmp_path_factory):
    """Records of 16 drawn people for training and 20 for validation, four pictures each, 32 pixels."""
    directory = tmp_path_factory.mktemp("data") / "people"
    with records.Writer(directory, "people", {"train": 2, "validation": 1}) as writer:
        for person in range(36):
            split = "train" if person < 16 else "validation"
            for i in range(4):
                writer.add(split, images.encode(synthetic.draw(person, i, 32)), person, f"p{person:02d}", f"p{person:02d}/{i}")
        writer.finish({"identities": [f"p{i:02d}" for i in range(36)], "alignment": {"method": "drawn"}})
    return directory


@pytest.fixture
def config(people):
    """Triplets and softmax together, random rules, dropout, moving average: everything that a resumed run could get wrong."""
    config = base.get_config()
    config.steps = 6
    config.model.update(size=32, embedding_size=16, dropout=0.2)
    config.data.update(records=str(people), workers=0)
    config.batch.update(people=8, images_per_person=2)
    config.transforms.update(shift=2, rotation=5.0, brightness=0.1, erase=0.3)
    config.triplet.rule = "semi_hard_random"
    config.softmax.update(weight=0.5, scale=16.0, margin=0.1)
    config.optimizer.update(name="adam_small_epsilon", learning_rate=1e-3, moving_average=0.9, weight_decay=1e-4)
    config.log_every = 1
    config.checkpoint_every = 2
    return config
