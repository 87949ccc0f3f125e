"""OME-TIFF, on `tifffile`.

What the XML says is checked before tifffile follows it: it allocates what the XML promises, opens the files that the
XML names, and guesses where the two do not agree.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from ...optional import import_optional
from ..errors import ReadError
from ..units import Length, number
from .frames import frame_size
from .source import SPACE, Format, Index, Source, StoredImage, import_zarr, is_whole, opened, pick

if TYPE_CHECKING:
    import tifffile

# https://www.openmicroscopy.org/Schemas/Documentation/Generated/OME-2016-06/ome_xsd.html#PixelType
_DTYPES = {
    "bit": "bool",
    "float": "float32",
    "double": "float64",
    "complex": "complex64",
    "double-complex": "complex128",
}
# numbers of compressions
_FAX = (2, 3, 4)
_LIMITED = (1, *_FAX, 5, 8, 32773, 32946, 34925, 34926, 50000)  # none, LZW, deflate, PackBits, LZMA, Zstandard
_WITH_SIZE = (7, 33003, 33004, 33005, 33007, 34712, 34933)  # JPEG, JPEG 2000, PNG
_MOST_PLANES = 2**22  # tifffile makes a list of as many planes as the XML says


class _Image(NamedTuple):
    """What the XML says of one image.

    Attributes:
        dtype: OME's name of the type of pixels.
        planes: How many there are, each with all its colours.
        shape: A plane's height and width.
        file: Name of the file that has the first plane; None for this one.
        page: The first plane's number in the file.
        sizes: Pixel size per spatial axis.
    """

    dtype: str | None
    planes: int
    shape: tuple[int, int]
    file: str | None
    page: int
    sizes: dict[str, Length]


def open_ome_tiff(source: Source, level: int, image: int | None, max_bytes: int | None) -> StoredImage:
    """Reads what an OME-TIFF says of an image; see `source.Opener`."""
    with _opened(source) as tiff:
        if not tiff.is_ome:
            raise ReadError(
                f"{source.name}: must be an OME-TIFF, whose metadata say the pixel size; this is another TIFF"
            )
        images = _read_xml(tiff.ome_metadata, source.name)
        for one in images:
            _check_plane(tiff, one, source)
        number = _pick_image(images, tiff.series, image, source.name)
        levels = tiff.series[number].levels
        chosen, finest, described = pick(levels, level, source.name), levels[0], images[number]
        _check_series(chosen, finest, described, source.name)
        axes = finest.axes.lower().replace("s", "c")
        if axes.count("c") > 1:
            raise ReadError(f"{source.name}: has both channels and colours (axes {finest.axes})")
        shape, dtype = tuple(map(int, chosen.shape)), chosen.dtype.newbyteorder("=")
        ratios = [full / size for full, size in zip(finest.shape, shape, strict=True)]
        chunks = _chunks(chosen)
    sizes = {
        axis: _times(described.sizes[axis], by)
        for axis, by in zip(axes, ratios, strict=True)
        if axis in described.sizes
    }
    return StoredImage(
        axes,
        shape,
        dtype,
        chunks,
        chunks,
        sizes,
        lambda part: _load(source, number, level, part, max_bytes),
        len(levels),
    )


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[Any]:
    """Opens a TIFF; planes of a set of files are found next to the first one, if it is a path."""
    tifffile = import_optional("tifffile", "data")
    if isinstance(source.place, Path):
        with tifffile.TiffFile(source.place) as tiff:
            yield tiff
    else:
        with opened(source) as file, tifffile.TiffFile(file, _multifile=False) as tiff:
            yield tiff


def _load(source: Source, number: int, level: int, part: Index, max_bytes: int | None) -> np.ndarray:
    with _opened(source) as tiff:
        series = tiff.series[number].levels[level]
        _check_segments(series, source.name)
        if max_bytes is not None:
            for page in {page.keyframe for page in series.pages}:
                page.decode = _bounded(page)
        plane = len(series.keyframe.shape)
        if is_whole(part, series.shape):
            return series.asarray().reshape(series.shape)
        if is_whole(part[-plane:], series.keyframe.shape):
            chosen = np.arange(len(series.pages)).reshape(series.shape[:-plane])[part[:-plane]]
            pixels = tiff.asarray(key=chosen.ravel().tolist(), series=number, level=level)
            return pixels.reshape(*chosen.shape, *series.keyframe.shape)
        zarr = import_zarr()
        with series.aszarr(multiscales=False) as store:  # level 0 of a pyramid is all of it otherwise
            return np.asarray(zarr.open_array(store, mode="r")[part])


def _times(size: Length, ratio: float) -> Length:
    """Returns a level's pixel size, which is so much larger than the first level's; what is no number stays."""
    value = number(size.value)
    return size if value is None else Length(value * ratio, size.unit)


def _pick_image(images: list[_Image], series: Any, image: int | None, name: str) -> int:
    """Returns the number of the image that is asked for."""
    if not series or any(one.kind != "ome" for one in series):
        raise ReadError(
            f"{name}: planes are missing: metadata are not those of the file, or other files have its planes"
        )
    if len(images) != len(series):
        raise ReadError(f"{name}: metadata are of {len(images)} images, the file has {len(series)}")
    if len(images) > 1 and image is None:
        raise ReadError(f"{name}: has {len(images)} images (or its set of files has): choose one with image")
    if not 0 <= (image or 0) < len(images):
        raise ReadError(f"{name}: image must be from 0 to {len(images) - 1}, got {image}")
    return image or 0


def _read_xml(text: str, name: str) -> list[_Image]:
    """Reads what is described of each image, and refuses what tifffile must not follow."""
    root = ElementTree.fromstring(text)
    for uuid in root.iterfind("{*}Image/{*}Pixels/{*}TiffData/{*}UUID"):
        file = uuid.get("FileName", "")
        if re.search(r"[/\\:\0]", file) or file == "..":
            raise ReadError(f"{name}: planes must be in files of the same folder, got {file!r:.200}")
    for along in root.iterfind("{*}StructuredAnnotations/{*}XMLAnnotation/{*}Value//*[@Start]"):
        start, end, step = (float(along.get(key, 1)) for key in ("Start", "End", "Step"))
        if not abs(end - start) <= _MOST_PLANES * abs(step):
            raise ReadError(f"{name}: {along.tag} must have at most {_MOST_PLANES} steps, got {along.attrib}")
    pixels = [image.find("{*}Pixels") for image in root.iterfind("{*}Image")]
    return [_read_pixels(one, root.get("UUID"), name) for one in pixels if one is not None]


def _read_pixels(pixels: ElementTree.Element, own: str | None, name: str) -> _Image:
    planes = math.prod(_count(pixels, f"Size{axis}", name) for axis in "ZCT")
    colours = max((_count(channel, "SamplesPerPixel", name, 1) for channel in pixels.iterfind("{*}Channel")), default=1)
    data = list(pixels.iterfind("{*}TiffData"))
    for one in data:
        for key in ("IFD", "FirstZ", "FirstC", "FirstT"):
            _count(one, key, name, 0)
    default = 1 if len(data) > 1 else planes // colours
    stored = sum(_count(one, "PlaneCount", name, 1 if "IFD" in one.attrib else default) for one in data)
    if planes != stored * colours or planes > _MOST_PLANES:
        raise ReadError(
            f"{name}: planes are missing or too many: {planes} by their axes, {stored * colours} by their list"
        )
    sizes = {
        axis: Length(pixels.get(f"PhysicalSize{key}"), pixels.get(f"PhysicalSize{key}Unit", "um"))
        for axis, key in zip(SPACE, "ZYX", strict=True)
    }
    uuid = pixels.find("{*}TiffData/{*}UUID")
    return _Image(
        dtype=pixels.get("Type", pixels.get("PixelType")),
        planes=planes // colours,
        shape=(_count(pixels, "SizeY", name), _count(pixels, "SizeX", name)),
        file=None if uuid is None or uuid.text == own else uuid.get("FileName"),
        page=_count(data[0], "IFD", name, 0) if data else 0,
        sizes=sizes,
    )


def _check_plane(tiff: Any, described: _Image, source: Source) -> None:
    """Fails if an image's first plane is not as large as the XML says: tifffile makes up planes to fill the image."""
    with contextlib.ExitStack() as stack:
        if described.file is not None and described.file != Path(source.name).name:
            if not isinstance(source.place, Path) or not source.place.with_name(described.file).is_file():
                raise ReadError(
                    f"{source.name}: planes are missing: other files have its planes: {described.file:.200}"
                )
            tiff = stack.enter_context(
                import_optional("tifffile", "data").TiffFile(source.place.with_name(described.file))
            )
        page = tiff.pages[described.page]
        if (page.imagelength, page.imagewidth) != described.shape:
            actual = (page.imagelength, page.imagewidth)
            raise ReadError(
                f"{source.name}: planes are missing: the first must be {described.shape} pixels, got {actual}"
            )


def _count(element: ElementTree.Element, key: str, name: str, default: int | None = None) -> int:
    """Returns a number of planes or the like."""
    text = element.get(key, None if default is None else str(default))
    if text is None or not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise ReadError(f"{name}: cannot be read: {key} must be a number, got {text!r:.80}")
    return int(text)


def _check_series(chosen: Any, finest: Any, described: _Image, name: str) -> None:
    """Fails if the file is not what the XML says."""
    if any(page is None for series in (chosen, finest) for page in series.pages):
        raise ReadError(f"{name}: planes are missing: a file of the set is not there, or has too few")
    if len(finest.pages) != described.planes or len(chosen.pages) != described.planes:
        raise ReadError(
            f"{name}: planes are missing or too many: has {len(chosen.pages)}, should have {described.planes}"
        )
    if described.dtype is not None and finest.dtype != np.dtype(_DTYPES.get(described.dtype, described.dtype)):
        raise ReadError(
            f"{name}: pixels must be of the type {described.dtype!r:.80} of the metadata, got {finest.dtype}"
        )
    if chosen.keyframe.compression in _FAX and chosen.keyframe.bitspersample != 1:
        raise ReadError(f"{name}: a compression of black and white pixels must not have others, got {chosen.dtype}")
    if chosen.ndim != finest.ndim or chosen.dtype != finest.dtype:
        raise ReadError(f"{name}: levels must be of one kind, got {finest.shape} and {chosen.shape}")


def _check_segments(series: Any, name: str) -> None:
    """Fails if a strip or tile is not in the file, of which tifffile makes zeros, or has not the bytes it needs."""
    keyframe, expected = series.keyframe, math.prod(series.keyframe.chunked)
    stored = expected * math.prod(keyframe.chunks) * keyframe.dtype.itemsize if keyframe.is_tiled else keyframe.nbytes
    if not {"StripByteCounts", "TileByteCounts"} & {tag.name for tag in keyframe.tags}:
        raise ReadError(f"{name}: a plane must say how many bytes its strips or tiles have")
    plain = keyframe.compression == 1 and keyframe.bitspersample % 8 == 0
    for page in series.pages:
        offsets, counts, end = page.dataoffsets, page.databytecounts, page.parent.filehandle.size
        if len(offsets) != len(counts) or (len(offsets) != expected and not page.is_contiguous):
            raise ReadError(f"{name}: a plane must have {expected} strips or tiles, got {len(offsets)}")
        if any(start <= 0 or size <= 0 or start + size > end for start, size in zip(offsets, counts, strict=True)):
            raise ReadError(f"{name}: a strip or tile is not in the file")
        if plain and sum(counts) != stored:
            raise ReadError(f"{name}: a plane must have {stored} bytes, got {sum(counts)}")


def _bounded(page: "tifffile.TiffPage") -> Callable[..., Any]:
    """Returns the page's decoder of segments, which now fails where one has more pixels than it should.

    tifffile itself limits what decoders write, but for formats of images, which say their own size.
    """
    decode, most = page.decode, 2 * math.prod(page.chunks)  # some strips are padded to whole blocks
    if page.compression not in (*_LIMITED, *_WITH_SIZE):
        raise ValueError(f"compression {page.compression!r} has no limit: read it with max_bytes None")

    def bounded(data: bytes | None, index: int, **options: Any) -> Any:
        size = frame_size(data) if data and page.compression in _WITH_SIZE else (0, 0)
        if size is None or math.prod(size) > most:
            raise ValueError(f"a strip or tile must have at most {most} pixels, got the frame {size}")
        return decode(data, index, **options)

    return bounded


def _chunks(series: Any) -> tuple[int, ...]:
    """Returns the shape of a strip or tile."""
    chunk = tuple(map(int, series.keyframe.chunks))
    return (*[1] * (series.ndim - len(chunk)), *chunk)[-series.ndim :]


OME_TIFF = Format("OME-TIFF", (".ome.tif", ".ome.tiff"), open_ome_tiff, has_levels=True, has_images=True)
