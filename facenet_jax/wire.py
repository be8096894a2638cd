"""What TensorFlow's file formats share: protobuf messages described by a few words, and the masked CRC-32C."""

from typing import Any

import google_crc32c
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory


def messages(package: str, schema: dict[str, str]) -> dict[str, Any]:
    """Message classes by name. `schema` maps a message to its fields, "number name type, ..."; `*type` is repeated.

    Fields that are not described are skipped on reading. Enumerations are int32 on the wire, and a map is a repeated message of key and value.
    """
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
    for message, fields in schema.items():
        descriptor = file.message_type.add(name=message)
        for number, name, kind in (field.split() for field in fields.split(", ")):
            field = descriptor.field.add(name=name, number=int(number))
            field.label = field.LABEL_REPEATED if kind.startswith("*") else field.LABEL_OPTIONAL
            kind = kind.removeprefix("*")
            if kind in schema:
                field.type, field.type_name = field.TYPE_MESSAGE, f".{package}.{kind}"
            else:
                field.type = field.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}")) for name in schema}


def masked_crc32c(data: bytes) -> int:
    """CRC-32C rotated right by 15 bits plus a constant, so that a checksum of data that holds checksums stays sound."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
