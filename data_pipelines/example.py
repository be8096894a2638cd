"""tf.train.Example without TensorFlow: the message is described here and left to the protobuf package."""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PACKAGE = "facenet_jax.example"


def _build() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="facenet_jax/example.proto", package=_PACKAGE, syntax="proto3")
    field = descriptor_pb2.FieldDescriptorProto
    for name, kind in (("BytesList", field.TYPE_BYTES), ("FloatList", field.TYPE_FLOAT), ("Int64List", field.TYPE_INT64)):
        message = file.message_type.add(name=name)
        message.field.add(name="value", number=1, label=field.LABEL_REPEATED, type=kind)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, (name, kind) in enumerate((("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List")), 1):
        feature.field.add(
            name=name, number=number, label=field.LABEL_OPTIONAL, type=field.TYPE_MESSAGE, type_name=f".{_PACKAGE}.{kind}", oneof_index=0
        )
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=field.LABEL_OPTIONAL, type=field.TYPE_STRING)
    entry.field.add(name="value", number=2, label=field.LABEL_OPTIONAL, type=field.TYPE_MESSAGE, type_name=f".{_PACKAGE}.Feature")
    features.field.add(
        name="feature", number=1, label=field.LABEL_REPEATED, type=field.TYPE_MESSAGE, type_name=f".{_PACKAGE}.Features.FeatureEntry"
    )
    example = file.message_type.add(name="Example")
    example.field.add(name="features", number=1, label=field.LABEL_OPTIONAL, type=field.TYPE_MESSAGE, type_name=f".{_PACKAGE}.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Example"))


Example = _build()


def serialise(image: bytes, label: int, identity: str, key: str) -> bytes:
    """One face as bytes; equal input gives equal bytes."""
    example = Example()
    feature = example.features.feature
    feature["image"].bytes_list.value.append(image)
    feature["label"].int64_list.value.append(label)
    feature["identity"].bytes_list.value.append(identity.encode())
    feature["key"].bytes_list.value.append(key.encode())
    return example.SerializeToString(deterministic=True)


def parse(data: bytes) -> dict[str, bytes | int | str]:
    """{"image": bytes, "label": int, "identity": str, "key": str}; KeyError or IndexError where one is missing."""
    feature = Example.FromString(data).features.feature
    fields = {name: feature[name] for name in ("image", "label", "identity", "key")}
    return {
        "image": fields["image"].bytes_list.value[0],
        "label": fields["label"].int64_list.value[0],
        "identity": fields["identity"].bytes_list.value[0].decode(),
        "key": fields["key"].bytes_list.value[0].decode(),
    }
