"""A map as COG: values, georeference and overviews, at awkward sizes."""

from __future__ import annotations

import itertools
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import rasterio
from dask.sizeof import sizeof
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from outputs_support import LONLAT, UTM, make_grid, random_codes
from rasterio.io import MemoryFile
from rasterio.transform import Affine
from rio_cogeo import cog_validate

from s2cd.codes import CODE_NODATA, QUANTUM, UNSEEN_AFTER, UNSEEN_BEFORE, decode_codes, encode_codes
from s2cd.errors import GridError
from s2cd.outputs.cog import map_cog, validity_cog
from s2cd.outputs.deflated import filled
from s2cd.outputs.overviews import code_pyramid
from s2cd.outputs.parts import joined, joined_validity, map_part
from s2cd.outputs.profiles import PROFILES

SHAPES = [(1, 1), (17, 19), (1, 1025), (512, 512), (513, 513), (1023, 1025)]
TOLERANCE = {"default": 0.0, "zstd": 0.0, "lerc": 0.0, "uint8": 0.5 / 254 + 1e-6}


def write(path: Path, codes: np.ndarray, system=UTM, **options) -> Path:
    """Write a map of which the chunks of one row and one column end in the midst of blocks, and of overviews'."""
    profile = options.get("profile", "default")
    parts = [
        map_part(codes[rows, cols], (rows.start, cols.start), shape=codes.shape, profile=profile)
        for rows, cols in itertools.product(*(cut(n) for n in codes.shape))
    ]
    with map_cog(*joined(parts, codes.shape, profile), make_grid(codes.shape, system), **options) as pieces:
        path.write_bytes(b"".join(pieces))
    return path


def cut(size: int) -> list[slice]:
    edges = sorted({0, *range(336, size, 720), size})
    return [slice(*ends) for ends in itertools.pairwise(edges)]


def probability(dataset: rasterio.DatasetReader, profile: str) -> np.ndarray:
    stored = dataset.read(1)
    if np.isnan(dataset.nodata):
        return stored
    return np.where(stored == dataset.nodata, np.nan, stored * PROFILES[profile].scale)


@pytest.mark.parametrize("system", [UTM, LONLAT], ids=["utm", "lonlat"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_map_keeps_shape_georeference_and_values_to_the_bit(tmp_path, shape, system):
    codes = random_codes(shape)
    with rasterio.open(write(tmp_path / "map.tif", codes, system)) as dataset:
        assert tuple(dataset.transform)[:6] == system[1]
        assert dataset.crs.to_epsg() == system[0]
        assert dataset.dtypes == ("float32",)
        assert np.isnan(dataset.nodata)
        np.testing.assert_array_equal(dataset.read(1), decode_codes(codes))
        assert dataset.tags()["QUANTUM"] == str(QUANTUM)


@pytest.mark.parametrize(
    "lay",
    [np.asfortranarray, lambda codes: np.repeat(codes, 2, axis=1)[:, ::2], lambda codes: codes[::-1].copy()[::-1]],
    ids=["column by column", "every other", "upside down"],
)
def test_how_codes_lie_in_memory_does_not_change_the_map(tmp_path, lay):
    codes = random_codes((700, 600))
    one, two = (write(tmp_path / f"{n}.tif", c) for n, c in enumerate((codes, lay(codes))))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_map_is_a_valid_cog(tmp_path, shape, profile):
    path = write(tmp_path / "map.tif", random_codes(shape), profile=profile)
    assert cog_validate(path, strict=True, quiet=True) == (True, [], [])


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("missing", [0.0, 0.3, 1.0])
def test_profiles_keep_values_within_their_precision(tmp_path, profile, missing):
    codes = random_codes((700, 600), missing)
    with rasterio.open(write(tmp_path / "map.tif", codes, profile=profile)) as dataset:
        found = probability(dataset, profile)
        assert dataset.scales == (PROFILES[profile].scale,)
        steps = found.astype(np.float64) / float(dataset.tags()["QUANTUM"])
    expected = decode_codes(codes)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    assert np.nanmax(np.abs(found - expected), initial=0) <= TOLERANCE[profile]
    assert np.nanmax(np.abs(steps - np.rint(steps)), initial=0) < 1e-4


def test_map_without_change_is_zero_everywhere(tmp_path):
    path = write(tmp_path / "map.tif", np.zeros((1100, 900), np.uint16))
    for level in (None, 0, 1):
        options = {} if level is None else {"overview_level": level}
        with rasterio.open(path, **options) as dataset:
            assert not dataset.read(1).any()


@pytest.mark.parametrize("profile", PROFILES)
def test_overviews_are_full_and_average_what_was_observed(tmp_path, profile):
    codes = random_codes((1500, 2051), missing=0.6)
    codes[:600, :700] = CODE_NODATA
    path = write(tmp_path / "map.tif", codes, profile=profile)
    expected = decode_codes(codes)
    with rasterio.open(path) as dataset:
        levels = len(dataset.overviews(1))
    assert levels == 3
    for level in range(levels):
        expected = mean_of_four(expected)
        with rasterio.open(path, overview_level=level) as overview:
            found = probability(overview, profile)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
        assert np.nanmax(np.abs(found - expected)) <= TOLERANCE[profile] + (level + 1) * QUANTUM / 2


@pytest.mark.parametrize("big", ["YES", "NO"])
@pytest.mark.parametrize("shape", [(17, 19), (1100, 1600)], ids=str)
def test_blocks_fill_the_header_of_large_files_too(tmp_path, shape, big):
    """Above 2 GB GDAL writes BigTIFF, whose numbers and entries have other sizes."""
    pyramid = [level.astype(np.uint8) for level in code_pyramid(random_codes(shape, missing=0))]
    header = header_of(shape, big)
    path = tmp_path / "map.tif"
    path.write_bytes(b"".join(filled(header, [deflated(level) for level in pyramid])))
    assert header[2] == {"YES": 43, "NO": 42}[big]
    assert cog_validate(path, strict=True, quiet=True) == (True, [], [])
    for level, expected in enumerate(pyramid):
        options = {"overview_level": level - 1} if level else {}
        with rasterio.open(path, **options) as dataset:
            np.testing.assert_array_equal(dataset.read(1), expected)


def header_of(shape: tuple[int, int], big: str) -> bytes:
    options = {"driver": "COG", "blocksize": 512, "compress": "DEFLATE", "sparse_ok": True, "bigtiff": big}
    profile = {"height": shape[0], "width": shape[1], "count": 1, "dtype": "uint8", "nodata": 0, **options}
    profile |= {"crs": f"EPSG:{UTM[0]}", "transform": Affine(*UTM[1])}
    with MemoryFile() as file:
        with file.open(**profile) as dataset:
            dataset.write(np.zeros(shape, np.uint8), 1)
        return file.read()


def deflated(level: np.ndarray) -> dict[tuple[int, int], bytes]:
    full = np.pad(level, [(0, -n % 512) for n in level.shape])
    places = itertools.product(*(range(n // 512) for n in full.shape))
    return {(i, j): zlib.compress(full[512 * i : 512 * i + 512, 512 * j : 512 * j + 512].tobytes()) for i, j in places}


@pytest.mark.parametrize("profile", ["zstd", "lerc"])
def test_threads_do_not_change_the_map(tmp_path, profile):
    codes = random_codes((1023, 1025))
    one, two = (write(tmp_path / f"{n}.tif", codes, threads=n, profile=profile) for n in (1, 2))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("profile", ["default", "uint8"])
@pytest.mark.parametrize("shape", [(17, 19), (1100, 2060), (2049, 4100)], ids=str)
def test_chunks_do_not_change_the_map(tmp_path, shape, profile):
    codes = random_codes(shape)
    whole = [map_part(codes, (0, 0), shape=shape, profile=profile)]
    with map_cog(*joined(whole, shape, profile), make_grid(shape), profile=profile) as pieces:
        assert write(tmp_path / "map.tif", codes, profile=profile).read_bytes() == b"".join(pieces)


@pytest.mark.parametrize("profile", ["default", "zstd"])
@pytest.mark.parametrize("shape", [(17, 19), (1100, 1600), (1100, 2060)], ids=str)
def test_validity_lies_where_its_pixels_do_however_many_levels_are_cut(shape, profile):
    why = np.random.default_rng(0).integers(0, 4, shape).astype(np.uint8)
    codes = np.array([7, UNSEEN_BEFORE, UNSEEN_AFTER, CODE_NODATA], np.uint16)[why]
    parts = [
        map_part(codes[rows, cols], (rows.start, cols.start), shape=shape, profile=profile, reasons=True)
        for rows, cols in itertools.product(*(cut(n) for n in shape))
    ]
    np.testing.assert_array_equal(joined_validity(parts, shape), why)
    assert sum(part.observed for part in parts) == (why == 0).sum()


def test_the_overviews_of_a_validity_layer_hold_its_classes_and_no_means(tmp_path):
    why = np.where(np.random.default_rng(0).random((1100, 900)) < 0.5, 3, 0).astype(np.uint8)
    path = tmp_path / "validity.tif"
    path.write_bytes(validity_cog(why, make_grid(why.shape)))
    with rasterio.open(path) as dataset, rasterio.open(path, overview_level=0) as overview:
        np.testing.assert_array_equal(dataset.read(1), why)
        assert (dataset.crs.to_epsg(), tuple(dataset.transform)[:6], dataset.nodata) == (*UTM, None)
        assert np.unique(overview.read(1)).tolist() == [0, 3]


def test_what_is_more_likely_than_not_is_changed():
    codes = np.array([[0, 512, 513, 1024, CODE_NODATA]], np.uint16)
    part = map_part(codes, (0, 0), shape=codes.shape)
    assert (part.pixels, part.observed, part.changed) == (5, 4, 2)


def test_most_of_a_large_map_waits_compressed():
    codes = random_codes((2048, 2048), missing=1)
    part = map_part(codes, (2048, 2048), shape=(6000, 6000))
    assert [len(cut.whole) for cut in part.cuts] == [16, 4]
    assert not any(cut.pieces for cut in part.cuts)
    assert part.codes.nbytes == codes.nbytes / 16
    assert sizeof(part) < codes.nbytes / 10


def test_a_part_that_shares_pixels_of_overviews_is_refused():
    with pytest.raises(ValueError, match=r"\(0, 1102\), expected multiples of 4"):
        map_part(random_codes((4, 4)), (0, 1102), shape=(2000, 2000))


def test_parts_that_leave_something_out_are_no_map():
    part = map_part(random_codes((500, 600)), (0, 0), shape=(1000, 600))
    with pytest.raises(GridError, match="300000 pixels, expected 600000"):
        joined([part], (1000, 600), "default")


def test_a_header_for_other_levels_is_refused():
    with pytest.raises(ValueError, match="0 blocks, expected 1"):
        filled(header_of((17, 19), "NO"), [{}])


def test_maps_written_at_the_same_time_do_not_mix(tmp_path):
    """Dask tasks of one worker encode in several threads of one process."""
    maps = [random_codes((600, 500 + n), seed=n) for n in range(8)]
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda n: write(tmp_path / f"{n}.tif", maps[n]), range(len(maps))))
    for path, codes in zip(paths, maps, strict=True):
        with rasterio.open(path) as dataset:
            np.testing.assert_array_equal(dataset.read(1), decode_codes(codes))


def test_text_that_is_special_in_xml_survives_in_tags(tmp_path):
    tags = {"BEFORE": 'a<b> & "c"'}
    with rasterio.open(write(tmp_path / "map.tif", random_codes((17, 19)), tags=tags)) as dataset:
        assert dataset.tags()["BEFORE"] == tags["BEFORE"]


@given(hnp.arrays(np.uint16, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 1024)))
@settings(max_examples=100)
def test_codes_survive_a_round_trip(codes):
    np.testing.assert_array_equal(encode_codes(decode_codes(codes)), codes)


def test_probabilities_are_rounded_to_the_nearest_code():
    values = np.array([[0, 0.0004, 0.0006, 0.5, 1.0, np.nan]], np.float32)
    np.testing.assert_array_equal(encode_codes(values), [[0, 0, 1, 512, 1024, CODE_NODATA]])


@pytest.mark.parametrize("wrong", [-0.1, 1.01, np.inf, 100.0])
def test_values_that_are_no_probability_are_refused(wrong):
    with pytest.raises(ValueError, match="expected 0 to 1"):
        encode_codes(np.array([[0.5, wrong]], np.float32))


def mean_of_four(values: np.ndarray) -> np.ndarray:
    rows, columns = values.shape
    padded = np.pad(values, ((0, rows % 2), (0, columns % 2)), constant_values=np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(padded.reshape(padded.shape[0] // 2, 2, -1, 2), axis=(1, 3), dtype=np.float64)
