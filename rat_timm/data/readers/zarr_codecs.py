"""Codecs of Zarr that decode a chunk to no more bytes than its shape and type promise, on `imagecodecs`.

zarr decodes a chunk to whatever its few bytes become, which may be gigabytes. Imported only where a Zarr array is
read, for it imports zarr.
"""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TypeAlias

import imagecodecs
import numpy as np
import zarr
from numcodecs.abc import Codec as Numcodec
from zarr.abc.codec import ArrayArrayCodec, ArrayBytesCodec, BytesBytesCodec
from zarr.codecs import ShardingCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer
from zarr.core.metadata import ArrayV2Metadata, ArrayV3Metadata

_Codec: TypeAlias = ArrayArrayCodec | ArrayBytesCodec | BytesBytesCodec

_COMPRESSORS = ("blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd")
_CHECKSUMS = ("adler32", "crc32", "crc32c", "fletcher32", "jenkins_lookup3")
# what these return has as many numbers as what they get, and numbers have at most 8 bytes
_FILTERS = ("astype", "bitround", "bytes", "delta", "fixedscaleoffset", "quantize", "shuffle", "transpose")


def bounded(array: zarr.Array) -> zarr.Array:
    """Returns the same array, with codecs that fail where a chunk decodes to more than it should.

    Raises:
        ValueError: If the array has a codec whose output cannot be limited.
    """
    metadata: ArrayV2Metadata | ArrayV3Metadata
    if isinstance(array.metadata, ArrayV3Metadata):
        metadata = replace(array.metadata, codecs=_bounded_codecs(array.metadata.codecs))
    else:
        filters, compressor = array.metadata.filters or (), array.metadata.compressor
        limit = prod(array.chunks) * array.dtype.itemsize
        if filters:
            limit = _with_overhead(8 * prod(array.chunks))
        metadata = replace(
            array.metadata,
            filters=tuple(_bounded_numcodec(codec, limit) for codec in filters) or None,
            compressor=None if compressor is None else _bounded_numcodec(compressor, limit),
        )
    return zarr.Array(zarr.AsyncArray(metadata, array.store_path))


def _with_overhead(size: int) -> int:
    """Returns how large pixels may get by what a codec before adds: headers of each inner chunk, or of a stream."""
    return 2 * size + 2**16


def _bounded_codecs(codecs: Iterable[_Codec]) -> tuple[_Codec, ...]:
    """Replaces what decompresses; the first such codec is the last that decodes, to pixels alone."""
    changed: list[_Codec] = []
    for codec in codecs:
        exact = not any(isinstance(before, BytesBytesCodec | ShardingCodec) for before in changed)
        changed.append(_bounded_codec(codec, exact))
    return tuple(changed)


def _bounded_codec(codec: _Codec, exact: bool) -> _Codec:
    if isinstance(codec, ShardingCodec):
        inner, index = _bounded_codecs(codec.codecs), _bounded_codecs(codec.index_codecs)
        return replace(codec, codecs=inner, index_codecs=index)
    described = codec.to_dict()
    name, configuration = str(described["name"]).removeprefix("numcodecs."), described.get("configuration")
    _check(name, configuration if isinstance(configuration, Mapping) else {})
    return _BoundedCodec(name, exact) if name in _COMPRESSORS else codec


def _bounded_numcodec(codec: Numcodec, limit: int) -> Numcodec:
    _check(codec.codec_id, codec.get_config())
    return _BoundedNumcodec(codec.codec_id, limit) if codec.codec_id in _COMPRESSORS else codec


def _check(name: str, configuration: Mapping[str, object]) -> None:
    allowed = (*_COMPRESSORS, *_CHECKSUMS, *_FILTERS)
    if name not in allowed:
        raise ValueError(f"codec must be one of {', '.join(allowed)}, or max_bytes None for any, got {name!r:.80}")
    for key, value in configuration.items():
        if key.endswith(("dtype", "astype")) and value is not None:
            dtype = np.dtype(str(value))
            if dtype.kind not in "buif" or dtype.itemsize > 8:
                raise ValueError(f"codec {name} must be of numbers, got the {key} {value!r:.80}")


@dataclass(frozen=True)
class _BoundedCodec(BytesBytesCodec):
    """A compressor of version 3.

    Attributes:
        name: That of imagecodecs.
        exact: Whether pixels alone were compressed, without headers of other codecs.
    """

    is_fixed_size = False
    name: str
    exact: bool

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        size = prod(chunk_spec.shape) * chunk_spec.dtype.to_native_dtype().itemsize
        limit = size if self.exact else _with_overhead(size)
        return chunk_spec.prototype.buffer.from_bytes(_decode(self.name, chunk_bytes.as_numpy_array(), limit))

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        return await asyncio.to_thread(self._decode_sync, chunk_bytes, chunk_spec)

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        raise NotImplementedError  # differs from chunk to chunk, as zarr's compressors say


class _BoundedNumcodec(Numcodec):
    """A compressor of version 2; decodes to at most so many bytes."""

    codec_id = "bounded"  # zarr wants one of the class

    def __init__(self, name: str, limit: int):
        self._name, self._limit = name, limit

    def encode(self, buf: object) -> bytes:
        raise NotImplementedError("only reads")

    def decode(self, buf: bytes, out: object = None) -> bytes:
        return _decode(self._name, buf, self._limit)


def _decode(name: str, content: bytes | np.ndarray, limit: int) -> bytes:
    options = {"header": True} if name == "lz4" else {}
    try:
        decoded = getattr(imagecodecs, f"{name}_decode")(content, out=limit + 1, **options)
    except Exception as error:
        raise ValueError(f"a chunk does not decode to at most {limit} bytes: {error}") from error
    if len(decoded) > limit:  # some decode as much as there is place for
        raise ValueError(f"a chunk does not decode to at most {limit} bytes, as its shape promises")
    return decoded
