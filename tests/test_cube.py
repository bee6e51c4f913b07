"""The datacube: lazy, native grid, exact pixels, checked grid."""

from __future__ import annotations

import re
from dataclasses import replace

import dask
import numpy as np
import pytest
import rasterio

from s2cd.catalog.scene import Grid
from s2cd.cube import cube_grid, open_cube
from s2cd.errors import ConfigError, GridError, NoScenesError, ReadError
from s2cd.thumbnails import thumbnail


@pytest.mark.parametrize("shape", [(17, 19), (200, 232), (101, 64)])
@pytest.mark.parametrize("chunk", [64, 2048])
def test_pixels_coordinates_and_crs(make_series, shape, chunk):
    scenes = make_series(shape=shape, dates=2)
    cube = open_cube(scenes, chunk=chunk)
    assert cube.dims == ("time", "band", "y", "x")
    assert cube.shape == (2, 8, *shape)
    assert cube.dtype == np.uint16
    assert dask.is_dask_collection(cube.data)
    assert cube.rio.crs.to_epsg() == 32631
    assert tuple(cube.rio.transform())[:6] == scenes[0].assets["red"].grid.transform
    assert (float(cube.x[0]), float(cube.y[0])) == (499985.0, 5699995.0)
    computed = cube.compute(scheduler="threads")
    for index, scene in enumerate(scenes):
        for band in ("red", "swir16", "scl"):
            with rasterio.open(scene.assets[band].href) as dataset:
                expected = dataset.read(1)
            factor = 1 if band == "red" else 2
            expected = expected.repeat(factor, 0).repeat(factor, 1)[: shape[0], : shape[1]]
            np.testing.assert_array_equal(computed.isel(time=index).sel(band=band), expected)


def test_bands_by_either_name_and_their_radiometry(make_series):
    scenes = make_series(dates=2)
    late = {**scenes[1].assets, "red": replace(scenes[1].assets["red"], offset=-0.1)}
    cube = open_cube([replace(scenes[1], assets=late), scenes[0]], bands=["B04", "nir"])
    assert list(cube.band.values) == ["red", "nir"]
    assert list(cube["id"].values) == ["scene-000", "scene-001"]
    np.testing.assert_array_equal(cube.offset, [[0, 0], [-0.1, 0]])
    np.testing.assert_array_equal(cube.scale, 1e-4)


def test_20_m_bands_alone_stay_at_20_m(make_series):
    cube = open_cube(make_series(shape=(101, 79), dates=1), bands=["B11", "scl"])
    assert cube.shape[2:] == (51, 40)


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        (["B99"], "unknown band 'B99', expected one of B01/coastal"),
        (["B05"], "scene-000 offers no band 'rededge1', only blue"),
        (["B04", "red"], "found .'red'. twice"),
        ([], "found none"),
    ],
)
def test_bands_that_cannot_be_had(make_series, bands, message):
    with pytest.raises(ConfigError, match=message):
        open_cube(make_series(dates=1), bands=bands)


def test_no_scenes():
    with pytest.raises(NoScenesError):
        open_cube([])


def test_scenes_of_two_crs(make_series):
    first, second = make_series(dates=2)
    moved = {k: replace(a, grid=replace(a.grid, epsg=32632)) for k, a in second.assets.items()}
    with pytest.raises(GridError, match="scene-001 lies on .*32632"):
        open_cube([first, replace(second, assets=moved)])


def test_invariant_4_a_failed_read_is_a_typed_error(make_series):
    scenes = make_series(dates=2)
    path = scenes[1].assets["nir"].href
    content = open(path, "rb").read()
    open(path, "wb").write(content[: len(content) // 3])
    with pytest.raises(ReadError, match=r"001/nir\.tif"):
        open_cube(scenes).compute(scheduler="threads")


def test_grid_of_a_part(make_series):
    cube = open_cube(make_series(dates=1))
    part = cube[:, :, 10:50, 20:120]
    grid = cube_grid(part)
    assert grid.shape == (40, 100)
    assert grid.transform == (10.0, 0.0, 500180.0, 0.0, -10.0, 5699900.0)


@pytest.mark.parametrize(
    ("rows", "cols"), [((10, 11), (20, 70)), ((4, 60), (7, 8)), ((2, 3), (230, 231)), ((0, 2), (0, 2))]
)
def test_a_part_of_a_cube_has_its_own_grid_even_one_pixel(make_series, rows, cols):
    part = open_cube(make_series(dates=1))[:, :, slice(*rows), slice(*cols)]
    shape = rows[1] - rows[0], cols[1] - cols[0]
    assert cube_grid(part) == Grid(32631, (10, 0, 499980 + 10 * cols[0], 0, -10, 5700000 - 10 * rows[0]), shape)


def test_a_cube_of_one_pixel_has_its_grid(make_series):
    scenes = make_series(shape=(1, 1), dates=1)
    assert cube_grid(open_cube(scenes)) == scenes[0].assets["red"].grid


def test_a_cube_without_pixels_or_chunks_is_refused(make_series):
    scenes = make_series(dates=1)
    with pytest.raises(GridError, match=r"cube has shape \(1, 8, 0, 232\), expected pixels"):
        cube_grid(open_cube(scenes)[:, :, 10:10])
    for chunk in (0, 512.5, "auto", None, (512, 512)):
        with pytest.raises(ConfigError, match=f"chunk: found {re.escape(repr(chunk))}, expected a whole number of pix"):
            open_cube(scenes, chunk=chunk)


def rewrite(asset, change, **profile):
    """Write the pixels of an asset anew after `change`."""
    with rasterio.open(asset.href) as dataset:
        data, described = change(dataset.read(1)), {**dataset.profile, **profile}
    with rasterio.open(asset.href, "w", **described | {"dtype": data.dtype}) as dataset:
        dataset.write(data, 1)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda data: data.astype(np.int16) - 400, r"int16 from -\d+ to \d+"),
        (lambda data: data.astype(np.float32) / 10000, r"float32 from 0\.\d+ to 0\.\d+"),
    ],
)
def test_pixels_that_a_cube_cannot_hold_are_refused(make_series, change, found):
    (scene,) = make_series(dates=1)
    rewrite(scene.assets["nir"], change)
    with pytest.raises(ReadError, match=rf"nir\.tif: holds {found}, expected whole numbers from 0 to 65535"):
        open_cube([scene]).compute(scheduler="sync")


def test_whole_numbers_of_another_type_are_taken(make_series):
    (scene,) = make_series(dates=1)
    expected = open_cube([scene]).values
    rewrite(scene.assets["nir"], lambda data: data.astype(np.float32))
    np.testing.assert_array_equal(open_cube([scene]).values, expected)


def test_a_file_with_another_nodata_than_its_item_is_refused(make_series):
    (scene,) = make_series(dates=1)
    rewrite(scene.assets["red"], lambda data: data, nodata=65535)
    with pytest.raises(ReadError, match=r"red\.tif: has nodata 65535, but its item 0; expected the same of both"):
        open_cube([scene]).compute(scheduler="sync")


@pytest.mark.parametrize("declared", [65535, None])
def test_another_nodata_than_0_is_that_of_the_cube(make_series, declared):
    """Of the item and of a file that declares it or none, and where the other half of a split datatake comes in."""
    scene, other = make_series(dates=2)
    expected = np.concatenate([open_cube([other]).values[..., :40, :], open_cube([scene]).values[..., 40:, :]], axis=2)

    def without_north(data):
        data[: 40 * len(data) // 200] = 65535
        return data

    for band in (b for b in scene.assets if b != "scl"):
        rewrite(scene.assets[band], without_north, nodata=declared)
        rewrite(other.assets[band], lambda data: data, nodata=declared)
    scene, other = with_nodata(scene, 65535), with_nodata(other, 65535)
    cube = open_cube([scene])
    assert cube.attrs["nodata"] == 65535
    assert (cube.sel(band="nir08").values == 65535).sum() == 40 * cube.sizes["x"]
    np.testing.assert_array_equal(open_cube([replace(scene, parts=(other,))]).values, expected)


def with_nodata(scene, nodata):
    assets = {b: a if b == "scl" else replace(a, nodata=nodata) for b, a in scene.assets.items()}
    return replace(scene, assets=assets)


def test_a_cube_has_one_nodata(make_series):
    first, second = make_series(dates=2)
    mixed = r"nodata: found 0 \(scene-000, .*\) and 65535 \(scene-001, .*\), expected one number from 0 to 65535"
    with pytest.raises(ConfigError, match=mixed):
        open_cube([first, with_nodata(second, 65535)])
    with pytest.raises(ConfigError, match=mixed):
        open_cube([replace(first, parts=(with_nodata(second, 65535),))])
    with pytest.raises(ConfigError, match=r"nodata: found -9999 \(scene-000, .*\), expected"):
        open_cube([with_nodata(first, -9999)])


@pytest.mark.parametrize("shape", [(65, 33), (129, 65), (64, 97)])
def test_coarse_bands_that_end_before_odd_fine_ones_are_repeated_in_every_chunk(make_series, shape):
    (scene,) = make_series(dates=1, shape=shape)
    assets = dict(scene.assets)
    for band in ("nir08", "swir16", "swir22", "scl"):
        rows, cols = (n // 2 for n in shape)
        rewrite(assets[band], lambda data, rows=rows, cols=cols: data[:rows, :cols], height=rows, width=cols)
        assets[band] = replace(assets[band], grid=replace(assets[band].grid, shape=(rows, cols)))
    scene = replace(scene, assets=assets)
    whole = open_cube([scene], chunk=1000).compute(scheduler="sync")
    assert (whole.sel(band="swir16") > 0).all()
    np.testing.assert_array_equal(open_cube([scene], chunk=32).compute(scheduler="sync"), whole)


def test_a_thumbnail_of_a_part_shows_that_part(make_series):
    (scene,) = make_series(shape=(300, 400), dates=1)
    whole, part = thumbnail(scene), open_cube([scene])[:, :, 96:160, 200:290]
    np.testing.assert_array_equal(thumbnail(scene, cube_grid(part)), whole[96:160, 200:290])
    assert thumbnail(scene, cube_grid(part), max_pixels=30).shape == (22, 30, 3)


def test_a_thumbnail_shows_dark_water_as_observed(make_series):
    (scene,) = make_series(shape=(64, 64), dates=1)
    for band in ("red", "green", "blue"):
        with rasterio.open(scene.assets[band].href, "r+") as dataset:
            data = np.full(dataset.shape, 980, np.uint16)  # reflectance below 0 after the offset of -0.1
            data[:32] = 0
            dataset.write(data, 1)
    assets = {name: replace(asset, offset=-0.1) for name, asset in scene.assets.items()}
    picture = thumbnail(replace(scene, assets=assets))
    assert (picture[32:] > 0).all()
    assert (picture[:32] == 0).all()
