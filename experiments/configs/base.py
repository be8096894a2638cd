"""Every setting of a run with its default; the other configs change some of them. Sizes, margins and names appear once."""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The defaults. `arg` is not used here."""
    del arg
    return ConfigDict(
        {
            "seed": 0,
            "steps": 1000,
            "init": "",  # a weights file to start from (its softmax head is not taken)
            "model": {
                "name": "small_resnet",
                "size": 64,  # side of the network's input in pixels
                "embedding_size": 128,
                "standardisation": "fixed",
                "dtype": "float32",  # or bfloat16; embeddings, mining and losses stay float32
                "dropout": 0.0,
                "bn_groups": 1,  # 1: statistics of the global batch; the number of devices: each on its own
            },
            "data": {
                "records": "",  # directory of records or tfds:name; relative paths are looked up in --data_dir first
                "split": "train",
                "synthetic_people": 0,  # above 0: draw so many people into the records when they are not there
                "workers": 1,  # processes that decode; 0 uses a thread
                "sampler": "people",  # people: P x K; shuffle: every image once an epoch
            },
            "batch": {
                "people": 30,
                "images_per_person": 4,
                "minimum_images": 2,
                "microbatches": 1,  # above 1: embed the batch in so many pieces, mine it whole; memory of a piece, BatchNorm by piece
                "remat": False,  # keep convolutions' outputs alone for the backward pass and make the rest again: less memory, the same step
            },
            "transforms": {
                "crop": 0,
                "shift": 0,
                "zoom": 0.0,
                "flip": True,
                "rotation": 0.0,
                "brightness": 0.0,
                "contrast": 0.0,
                "grey": 0.0,
                "jpeg_quality": 0,
                "erase": 0.0,
            },
            "triplet": {"weight": 1.0, "rule": "semi_hard", "margin": 0.2, "block": 256, "reduction": "mean"},
            "softmax": {"weight": 0.0, "scale": 0.0, "margin": 0.0, "smoothing": 0.0},
            "optimizer": {
                "name": "adagrad",
                "learning_rate": 0.05,
                "schedule": "constant",
                "warmup": 0,
                "epoch_steps": 1000,
                "weight_decay": 0.0,
                "clip": 0.0,
                "moving_average": 0.0,
            },
            "log_every": 50,
            "checkpoint_every": 500,
            "evaluate_every": 0,
            "evaluation": {
                "records": "",  # where the pairs' images are; empty: the same as data.records
                "split": "validation",
                "crop": 0,  # of other records than data.records: cut so many central pixels; of the same, transforms.crop counts
                "pairs": "",  # an LFW pairs.txt; empty: pairs are drawn from the split's people
                "distance": "squared",
                "flip": False,
                "mean_subtraction": False,
            },
        }
    )
