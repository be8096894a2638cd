"""tf.train.Example without TensorFlow: the message is described here and left to the protobuf package."""

from facenet_jax.wire import messages

_MESSAGES = messages(
    "facenet_jax.example",
    {
        "BytesList": "1 value *bytes",
        "Int64List": "1 value *int64",
        "Feature": "1 bytes_list BytesList, 3 int64_list Int64List",
        "Entry": "1 key string, 2 value Feature",
        "Features": "1 feature *Entry",
        "Example": "1 features Features",
    },
)


def serialise(image: bytes, label: int, identity: str, key: str) -> bytes:
    """One face as bytes; equal input gives equal bytes."""
    example = _MESSAGES["Example"]()
    for name, value in (("identity", identity.encode()), ("image", image), ("key", key.encode()), ("label", label)):
        feature = example.features.feature.add(key=name).value
        (feature.int64_list if name == "label" else feature.bytes_list).value.append(value)
    return example.SerializeToString()


def parse(data: bytes) -> dict[str, bytes | int | str]:
    """{"image": bytes, "label": int, "identity": str, "key": str}; KeyError or IndexError where one is missing."""
    feature = {entry.key: entry.value for entry in _MESSAGES["Example"].FromString(data).features.feature}
    return {
        "image": feature["image"].bytes_list.value[0],
        "label": feature["label"].int64_list.value[0],
        "identity": feature["identity"].bytes_list.value[0].decode(),
        "key": feature["key"].bytes_list.value[0].decode(),
    }


def parse_image(data: bytes) -> bytes:
    """The image alone; KeyError where there is none."""
    for entry in _MESSAGES["Example"].FromString(data).features.feature:
        if entry.key == "image":
            return entry.value.bytes_list.value[0]
    raise KeyError("image")
