"""Damaged files: right pixels with the right size, or one error that names the file.

A few cases of each format, or as many as the environment's RAT_TIMM_FUZZ says. What nothing in a file contradicts, such
as the number that is the pixel size, is left as it is, or any answer to it is right.
"""

import gzip
import json
import re
import shutil
import struct

import nibabel
import numpy as np
import pytest
import tifffile
import torch
from fuzzing import count, damage, outcome
from test_readers import SIZES, VOLUME, write_levels, write_nifti, write_tiff

from rat_timm.data import Scan, read

NASTY = ["", "0", "-1", "1", "2", "3", "7", "999999999", "1e400", "nan", "true", "1_0", "\u0663", "../b", "/etc/passwd"]
NASTY += ["http://localhost/a", "file:///etc", "9**9**9*um", "px", "\ufffdm", "a" * 4000]
VALUES = [None, True, 0, -1, 1, 2, 3, 7, 10**9, 2**63, 10**400, 0.5, [], {}, [1], ["../b"], *NASTY]
WORDS = [0, 1, 2, 7, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1]


def has(scan, sizes=SIZES):
    """Tells whether pixels are right, and each size is as it was or a number that was put in its place."""
    others = (0.5, 1.0, 2.0, 3.0, 7.0)
    return np.array_equal(scan.pixels, VOLUME[None]) and all(
        size == pytest.approx(known) or size in others for size, known in zip(scan.spacing, sizes, strict=True)
    )


def has_strips(scan, rows):
    """Tells whether pixels are right; up to three strips may be others of the file: its offset alone tells a strip."""
    if scan.pixels.shape != (1, *VOLUME.shape):
        return False
    expected, pixels = (array.reshape(-1, rows * 8) for array in (VOLUME, scan.pixels.numpy()))
    wrong = pixels[(pixels != expected).any(1)]
    known = (wrong[:, None] == expected[None]).all(2).any(1)
    return len(wrong) <= 3 and known.all() and has(Scan(torch.from_numpy(VOLUME[None]), scan.spacing))


def run(cases, change, path, original, is_right=has):
    """Tries some cases; each changes the file, is read, and must be right or refused.

    Before that the undamaged file is read, which imports what is needed.
    """
    assert has(read(original))
    results = {"read": 0, "refused": 0}
    for case in range(cases):
        made = change(np.random.default_rng(case))
        try:
            results[outcome(lambda: read(path, max_bytes=2**26), path.name, path.parent, is_right)] += 1
        except BaseException as error:
            raise AssertionError(f"case {case}, {made}: {error}") from error
    return results


def spans(content, *patterns):
    """Returns where patterns' groups are."""
    return [match.span(1) for pattern in patterns for match in re.finditer(pattern, content)]


SIZES_IN_XML = (rb'PhysicalSize.="([^"]*)"', rb'PhysicalSize.Unit="([^"]*)"', rb'DimensionOrder="([^"]*)"')


@pytest.mark.parametrize("options", [{"tile": (16, 16)}, {"rowsperstrip": 2}, {"rowsperstrip": 6, "bigtiff": True}])
def test_bytes_of_ome_tiff(tmp_path, options):
    path = write_tiff(tmp_path / "a.ome.tif", VOLUME, "ZYX", compression="zlib", **options)
    content = path.read_bytes()
    free = spans(content, *SIZES_IN_XML)
    rows = options.get("rowsperstrip", 6)
    results = run(
        count(40),
        lambda rng: path.write_bytes(damage(content, rng, free)),
        path,
        path,
        lambda scan: has_strips(scan, rows),
    )
    assert results["refused"] > 0


def test_tags_of_ome_tiff(tmp_path):
    path = write_tiff(tmp_path / "a.ome.tif", VOLUME, "ZYX", compression="zlib", rowsperstrip=2)
    content = path.read_bytes()
    with tifffile.TiffFile(path) as tiff:
        tags = [tag for page in tiff.pages for tag in page.tags.values() if tag.name != "ImageDescription"]

    def change(rng):
        tag, part = tags[rng.integers(len(tags))], rng.integers(4)
        place, form = [(tag.offset, "<H"), (tag.offset + 2, "<H"), (tag.offset + 4, "<I"), (tag.offset + 8, "<I")][part]
        word = WORDS[rng.integers(len(WORDS))] & (0xFFFF if form == "<H" else 0xFFFFFFFF)
        changed = bytearray(content)
        struct.pack_into(form, changed, place, word)
        path.write_bytes(changed)
        return tag.name, part, word

    assert run(count(40), change, path, path, lambda scan: has_strips(scan, 2))["refused"] > 0


def test_xml_of_ome_tiff(tmp_path):
    path = write_tiff(tmp_path / "a.ome.tif", VOLUME, "ZYX", compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        xml = tiff.ome_metadata
    attributes = [match.span(1) for match in re.finditer(r'[\w:]+="([^"]*)"', xml)]
    elements = [match.span() for match in re.finditer(r"<[^<>]*>", xml)]
    original = path.read_bytes()

    def change(rng):
        path.write_bytes(original)
        kind = rng.integers(4)
        start, end = (attributes if kind < 2 else elements)[rng.integers(len(attributes if kind < 2 else elements))]
        new = [NASTY[rng.integers(len(NASTY))], NASTY[rng.integers(len(NASTY))], "", xml[start:end] * 2][kind]
        tifffile.tiffcomment(path, (xml[:start] + new + xml[end:]).encode())
        return xml[start - 20 : end], new

    assert run(count(40), change, path, path)["refused"] > 0


@pytest.mark.parametrize(("version", "sharded"), [("0.4", False), ("0.5", False), ("0.5", True)])
def test_files_of_ome_zarr(tmp_path, version, sharded):
    zarr = pytest.importorskip("zarr")
    numcodecs = pytest.importorskip("numcodecs")
    gzipped = numcodecs.GZip() if version == "0.4" else zarr.codecs.GzipCodec()
    options = {"chunks": (2, 3, 4), "compressors": [gzipped]} | ({"shards": (4, 6, 4)} if sharded else {})
    original = write_levels(tmp_path / "original.zarr", [VOLUME], "zyx", version=version, **options)
    path = tmp_path / "case" / "a.zarr"
    files = [file.relative_to(original) for file in original.rglob("*") if file.is_file()]
    files = sorted(file for file in files if (original / file).read_bytes().strip() != b"{}")
    gone = []

    def change(rng):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(original, path)
        file = path / files[rng.integers(len(files))]
        gone[:] = [not is_metadata(file) and rng.integers(8) == 0]
        if gone[0]:
            file.unlink()
        elif is_metadata(file) and rng.integers(2):
            return file, change_json(file, rng)
        else:
            content = file.read_bytes()
            file.write_bytes(damage(content, rng, spans(content, *FREE_IN_JSON) if is_metadata(file) else []))
        return file, gone

    assert run(count(40), change, path, original, lambda scan: agrees(scan, gone[0]))["refused"] > 0


FREE_IN_JSON = (rb'"separator": "([^"]*)"', rb'"dimension_separator": "([^"]*)"', rb'"dtype": "([^"]*)"')
FREE_IN_JSON += (rb'"order": "([^"]*)"', rb'"name": "([xyz])"', rb'"scale": \[([^\]]*)\]', rb'"data_type": "([^"]*)"')


def is_metadata(file):
    return file.name.startswith((".z", "zarr.json"))


def change_json(file, rng):
    """Puts something else in the place of one value of the metadata, or drops it."""
    tree = json.loads(file.read_text())
    places = [(node, key) for node in nodes(tree) for key in (node if isinstance(node, dict) else range(len(node)))]
    places = [(node, key) for node, key in places if key not in ("separator", "dimension_separator")]
    node, key = places[rng.integers(len(places))]
    value = VALUES[rng.integers(len(VALUES))]
    if rng.integers(8) == 0:
        del node[key]
    else:
        node[key] = value
    file.write_text(json.dumps(tree))
    return key, value


def nodes(tree):
    yield tree
    for child in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(child, dict | list):
            yield from nodes(child)


def agrees(scan, gone):
    """Tells whether pixels are right where the volume is: zarr's metadata alone say how large an array is.

    A chunk that is not there is one that holds the fill value.
    """
    pixels, spacing = scan.pixels.numpy(), scan.spacing
    if pixels.ndim == 3:  # an array of one plane is an image
        pixels, spacing = pixels[:, None], (SIZES[0], *spacing)
    if pixels.ndim != 4 or len(pixels) != 1:
        return False
    common = tuple(slice(min(sizes)) for sizes in zip(pixels.shape[1:], VOLUME.shape, strict=True))
    same = pixels[0][common] == VOLUME[common]
    return (same.mean() > 0.4 if gone else same.all()) and has(Scan(torch.from_numpy(VOLUME[None]), spacing))


# What nothing else in a header contradicts: type and scale of values, and what the affine matrix is made of.
FREE_FIELDS = {"datatype", "bitpix", "pixdim", "scl_slope", "scl_inter", "qform_code", "sform_code", "xyzt_units"}
FREE_FIELDS |= {"srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d"}


def fields(header):
    """Returns where the fields of a header are."""
    dtype = header.template_dtype
    return {
        name: (dtype.fields[name][1], dtype.fields[name][1] + dtype.fields[name][0].itemsize) for name in dtype.names
    }


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_headers_of_nifti(tmp_path, name, kind):
    path = tmp_path / name
    image = kind(VOLUME.T.astype(np.int16), np.diag([*SIZES[::-1], 1.0]))
    image.header.set_xyzt_units("micron")
    content = image.to_bytes()
    free = [span for field, span in fields(image.header).items() if field in FREE_FIELDS]
    free += [(int(image.header["vox_offset"]) or image.header.template_dtype.itemsize + 4, len(content))]
    pack = gzip.compress if path.suffix == ".gz" else bytes
    path.write_bytes(pack(content))
    assert run(count(40), lambda rng: path.write_bytes(pack(damage(content, rng, free))), path, path)["refused"] > 0


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_fields_of_nifti(tmp_path, name):
    path = tmp_path / name
    image = nibabel.Nifti1Image(VOLUME.T.astype(np.int16), np.diag([*SIZES[::-1], 1.0]))
    image.header.set_xyzt_units("micron")
    content, pack = image.to_bytes(), gzip.compress if path.suffix == ".gz" else bytes
    places, chosen = fields(image.header), []
    path.write_bytes(pack(content))

    def change(rng):
        field = list(places)[rng.integers(len(places))]
        chosen[:] = [field]
        start, end = places[field]
        word = struct.pack("<Q", WORDS[rng.integers(len(WORDS))] << int(rng.integers(0, 32, endpoint=True)))
        place = int(rng.integers(start, end))
        changed = bytearray(content)
        changed[place:end] = (word + bytes(end - start))[: end - place]
        path.write_bytes(pack(changed))
        return field, word

    assert run(count(40), change, path, path, lambda scan: chosen[0] in FREE_FIELDS or has(scan))["refused"] > 0


def test_bytes_of_gzipped_nifti(tmp_path):
    path = write_nifti(tmp_path / "a.nii.gz", VOLUME.T.astype(np.int16), SIZES[::-1], "um")
    content = path.read_bytes()
    assert run(count(40), lambda rng: path.write_bytes(damage(content, rng)), path, path)["refused"] > 0
