"""A folder of .SAFE products, read from metadata of the form ESA writes, with JPEG 2000 pixels."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine

from s2cd.catalog import freeze, search
from s2cd.errors import CatalogError, NoScenesError, S2cdWarning
from s2cd.reader import band_source, read_window

BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
METRES = {"B01": 60, "B02": 10, "B03": 10, "B04": 10, "B08": 10, "B09": 60, "B10": 60}
SIZE = {10: 240, 20: 120, 60: 40}


def write_product(folder: Path, *, level: str, baseline: str, offset: int | None, seed: int = 0) -> Path:
    """Write a small product of tile 33XWJ: the elements that matter, where ESA puts them."""
    number = baseline.replace(".", "")
    name = f"S2B_MSIL{level}_20220413T150759_N{number}_R025_T33XWJ_20220414T082126"
    product = folder / f"{name}.SAFE"
    granule = f"L{level}_T33XWJ_A026649_20220413T150756"
    images = []
    for band in (*BANDS, "SCL") if level == "2A" else BANDS:
        if level == "2A" and band == "B10":
            continue
        for metres in sorted({METRES.get(band, 20), 20, 60} - {10} | {METRES.get(band, 20)}):
            if level == "1C" and metres != METRES.get(band, 20):
                continue
            place = f"R{metres}m/" if level == "2A" else ""
            suffix = f"_{metres}m" if level == "2A" else ""
            stem = f"GRANULE/{granule}/IMG_DATA/{place}T33XWJ_20220413T150759_{band}{suffix}"
            images.append(f"<IMAGE_FILE>{stem}</IMAGE_FILE>")
            _write_image(product / f"{stem}.jp2", band, metres, seed)
    tag = "BOA_ADD_OFFSET" if level == "2A" else "RADIO_ADD_OFFSET"
    offsets = "".join(f'<{tag} band_id="{n}">{offset}</{tag}>' for n in range(13)) if offset is not None else ""
    spectral = "".join(
        f'<Spectral_Information bandId="{n}" physicalBand="{b if b == "B8A" else f"B{int(b[1:])}"}"/>'
        for n, b in enumerate(BANDS)
    )
    quantity = "BOA_QUANTIFICATION_VALUE" if level == "2A" else "QUANTIFICATION_VALUE"
    (product / f"MTD_MSIL{level}.xml").write_text(f"""<?xml version="1.0" encoding="UTF-8"?>
<n1:Level-{level}_User_Product xmlns:n1="https://psd-14.sentinel2.eo.esa.int/PSD/User_Product_Level-{level}.xsd">
  <n1:General_Info>
    <Product_Info>
      <PRODUCT_URI>{name}.SAFE</PRODUCT_URI>
      <PROCESSING_LEVEL>Level-{level}</PROCESSING_LEVEL>
      <PRODUCT_TYPE>S2MSI{level}</PRODUCT_TYPE>
      <PROCESSING_BASELINE>{baseline}</PROCESSING_BASELINE>
      <GENERATION_TIME>2022-04-14T08:21:26.580338Z</GENERATION_TIME>
      <Datatake datatakeIdentifier="GS2B_20220413T150759_026649_N{baseline}">
        <SPACECRAFT_NAME>Sentinel-2B</SPACECRAFT_NAME>
        <SENSING_ORBIT_NUMBER>25</SENSING_ORBIT_NUMBER>
      </Datatake>
      <Product_Organisation><Granule_List>
        <Granule datastripIdentifier="S2B_OPER_MSI_L{level}_DS_ESRI_20220414T082127_S20220413T150756_N{baseline}"
                 granuleIdentifier="S2B_OPER_MSI_L{level}_TL_ESRI_20220414T082127_A026649_T33XWJ_N{baseline}">
          {"".join(images)}
        </Granule>
      </Granule_List></Product_Organisation>
    </Product_Info>
    <Product_Image_Characteristics>
      <QUANTIFICATION_VALUES_LIST><{quantity} unit="none">10000</{quantity}></QUANTIFICATION_VALUES_LIST>
      {offsets}
      <Spectral_Information_List>{spectral}</Spectral_Information_List>
    </Product_Image_Characteristics>
  </n1:General_Info>
  <n1:Geometric_Info><Product_Footprint><Product_Footprint><Global_Footprint>
    <EXT_POS_LIST>80.165 14.999 80.142 17.733 80.109 14.998 80.165 14.999 </EXT_POS_LIST>
  </Global_Footprint></Product_Footprint></Product_Footprint></n1:Geometric_Info>
  <n1:Quality_Indicators_Info><Cloud_Coverage_Assessment>98.94</Cloud_Coverage_Assessment></n1:Quality_Indicators_Info>
</n1:Level-{level}_User_Product>""")
    sizes = "".join(
        f'<Size resolution="{m}"><NROWS>{n}</NROWS><NCOLS>{n}</NCOLS></Size>'
        f'<Geoposition resolution="{m}"><ULX>499980</ULX><ULY>8900040</ULY><XDIM>{m}</XDIM><YDIM>-{m}</YDIM>'
        "</Geoposition>"
        for m, n in SIZE.items()
    )
    (product / "GRANULE" / granule / "MTD_TL.xml").write_text(f"""<?xml version="1.0" encoding="UTF-8"?>
<n1:Level-{level}_Tile_ID xmlns:n1="https://psd-14.sentinel2.eo.esa.int/PSD/S2_PDI_Level-{level}_Tile_Metadata.xsd">
  <n1:General_Info><SENSING_TIME metadataLevel="Standard">2022-04-13T15:08:07.846358Z</SENSING_TIME></n1:General_Info>
  <n1:Geometric_Info><Tile_Geocoding metadataLevel="Brief">
    <HORIZONTAL_CS_CODE>EPSG:32633</HORIZONTAL_CS_CODE>{sizes}
  </Tile_Geocoding></n1:Geometric_Info>
</n1:Level-{level}_Tile_ID>""")
    return product


def as_of_2017(product: Path) -> Path:
    """Turn a product of level 2A into one of issue 14.2: other names of elements, files that begin with L2A_.

    Each resolution has a list of its own, in which the elevation is, too, which the product does not hold.
    """
    info = product / "MTD_MSIL2A.xml"
    text = info.read_text().replace("Level-2A</", "Level-2Ap</").replace("S2MSI2A<", "S2MSI2Ap<")
    for name in ("Product_Info", "Product_Organisation", "Product_Image_Characteristics", "BOA_QUANTIFICATION_VALUE"):
        text = re.sub(rf"(</?){name}\b", rf"\1L2A_{name}", text)
    for name in ("PRODUCT_URI", "IMAGE_FILE"):
        text = re.sub(rf"(</?){name}>", rf"\1{name}_2A>", text)
    text = text.replace("QUANTIFICATION_VALUES_LIST", "L1C_L2A_Quantification_Values_List")
    text = text.replace("<PRODUCT_URI_2A>", "<PRODUCT_URI_1C>S2B_MSIL1C.SAFE</PRODUCT_URI_1C><PRODUCT_URI_2A>")
    text = re.sub("<Spectral_Information_List>.*</Spectral_Information_List>", "", text)
    for path in product.glob("GRANULE/*/IMG_DATA/*/*.jp2"):
        text = text.replace(f"/{path.stem}<", f"/L2A_{path.stem}<")
        path.rename(path.with_name(f"L2A_{path.name}"))
    start, images, end = re.split(r"(<IMAGE_FILE_2A>.*</IMAGE_FILE_2A>)", text)
    opening = re.findall(r"<Granule_List>\s*<Granule .*?>", start, re.DOTALL)[0]
    lists = []
    for metres in SIZE:
        listed = re.findall(rf"<IMAGE_FILE_2A>[^<]*_{metres}m</IMAGE_FILE_2A>", images)
        height = re.sub(r"IMG_DATA/.*<", f"AUX_DATA/L2A_T33XWJ_20220413T150759_DEM_{metres}m<", listed[0])
        lists.append("".join([*listed, height]))
    info.write_text(start + f"</Granule></Granule_List>{opening}".join(lists) + end)
    return product


def pixels(band: str, metres: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, *band.encode(), metres])
    shape = (SIZE[metres], SIZE[metres])
    return (
        rng.integers(0, 12, shape).astype(np.uint8) if band == "SCL" else rng.integers(1, 9999, shape).astype(np.uint16)
    )


def _write_image(path: Path, band: str, metres: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = pixels(band, metres, seed)
    with rasterio.open(
        path, "w", driver="JP2OpenJPEG", height=data.shape[0], width=data.shape[1], count=1, dtype=data.dtype,
        crs="EPSG:32633", transform=Affine(metres, 0, 499980, 0, -metres, 8900040), QUALITY=100, REVERSIBLE="YES",
    ) as dataset:  # fmt: skip
        dataset.write(data, 1)


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("products")
    write_product(folder, level="2A", baseline="04.00", offset=-1000)
    return folder


def test_l2a_product(products: Path) -> None:
    (scene,) = search(products)
    assert scene.id == "S2B_MSIL2A_20220413T150759_N0400_R025_T33XWJ_20220414T082126"
    assert (scene.tile, scene.orbit, scene.baseline, scene.level) == ("33XWJ", 25, "04.00", "L2A")
    assert (scene.platform, scene.cloud_cover) == ("sentinel-2b", 98.94)
    assert scene.time.isoformat() == "2022-04-13T15:08:07.846358+00:00"
    assert len(scene.assets) == 13
    assert {a.offset for b, a in scene.assets.items() if b != "scl"} == {-0.1}
    assert {b: a.grid.transform[0] for b, a in scene.assets.items() if b in {"red", "nir08", "coastal", "scl"}} == {
        "red": 10,
        "nir08": 20,
        "coastal": 60,
        "scl": 20,
    }
    assert scene.footprint["coordinates"][0][0] == [14.999, 80.165]


def test_pixels_are_read_on_the_grid_of_the_metadata(products: Path) -> None:
    (scene,) = search(products)
    grid = scene.assets["red"].grid
    window = (slice(3, 233), slice(10, 240))
    assert np.array_equal(read_window(band_source(scene, "red"), grid, window), pixels("B04", 10, 0)[window])
    coarse = read_window(band_source(scene, "scl"), grid, window)
    assert np.array_equal(coarse, pixels("SCL", 20, 0).repeat(2, 0).repeat(2, 1)[window])


def test_the_cloud_probability_of_a_product_can_be_its_mask(tmp_path: Path) -> None:
    product = write_product(tmp_path, level="2A", baseline="05.09", offset=-1000)
    granule = next((product / "GRANULE").iterdir())
    _write_image(granule / "QI_DATA" / "MSK_CLDPRB_20m.jp2", "SCL", 20, 1)
    (scene,) = search(tmp_path, extra=("cloud",))
    assert scene.assets["cloud"].grid == scene.assets["scl"].grid
    window = (slice(4, 100), slice(10, 240))
    found = read_window(band_source(scene, "cloud"), scene.assets["red"].grid, window)
    assert np.array_equal(found, pixels("SCL", 20, 1).repeat(2, 0).repeat(2, 1)[window])


def test_l2a_products_of_2017_have_other_names_for_the_same(tmp_path: Path) -> None:
    (usual,) = search(write_product(tmp_path, level="2A", baseline="02.05", offset=None))
    product = as_of_2017(Path(usual.address or ""))
    granule = next((product / "GRANULE").iterdir())
    _write_image(granule / "QI_DATA" / "L2A_T33XWJ_20220413T150759_CLD_20m.jp2", "SCL", 20, 1)
    (scene,) = search(tmp_path, extra=("cloud",))
    assert scene.assets.pop("cloud").grid == usual.assets["scl"].grid
    assert "/R20m/L2A_T33XWJ_20220413T150759_SCL_20m.jp2" in scene.assets["scl"].href
    renamed = {b: replace(a, href=a.href.replace("/L2A_T33XWJ_2", "/T33XWJ_2")) for b, a in scene.assets.items()}
    assert replace(scene, assets=renamed) == usual
    window = (slice(3, 233), slice(10, 240))
    found = read_window(band_source(scene, "red"), scene.assets["red"].grid, window)
    assert np.array_equal(found, pixels("B04", 10, 0)[window])


def test_a_product_by_its_own_path_and_frozen(products: Path, tmp_path: Path) -> None:
    found = search(next(products.iterdir()))
    assert found == search(products, tiles="33XWJ", bbox=(15, 80, 16, 81))
    freeze(found, tmp_path / "found.parquet")
    assert search(tmp_path / "found.parquet") == found


@pytest.mark.parametrize(("baseline", "offset", "expected"), [("03.01", None, 0.0), ("05.09", -1000, -0.1)])
def test_l1c_products(tmp_path: Path, baseline: str, offset: int | None, expected: float) -> None:
    write_product(tmp_path, level="1C", baseline=baseline, offset=offset)
    (scene,) = search(tmp_path)
    assert scene.level == "L1C"
    assert set(scene.assets) >= {"red", "cirrus", "swir22"}
    assert {a.offset for a in scene.assets.values()} == {expected}


@pytest.mark.parametrize(("level", "baseline"), [("2A", "99.99"), ("1C", "99.99"), ("2A", "05.11")])
@pytest.mark.parametrize(("offset", "expected"), [(None, 0.0), (-1000, -0.1)])
def test_a_product_has_the_offset_that_its_metadata_state(
    tmp_path: Path, level: str, baseline: str, offset: int | None, expected: float
) -> None:
    """As of Sen2Cor's toolbox, whose products are all of baseline 99.99: without one where their L1C has none."""
    write_product(tmp_path, level=level, baseline=baseline, offset=offset)
    (scene,) = search(tmp_path)
    assert scene.baseline == baseline
    assert {a.offset for a in scene.assets.values()} == {expected} | ({0.0} if level == "2A" else set())


def test_a_product_that_is_not_whole_is_left_out(tmp_path: Path) -> None:
    product = write_product(tmp_path, level="1C", baseline="05.09", offset=-1000)
    for number, day in enumerate(("20230601", "20230606")):
        broken = tmp_path / f"S2A_MSIL1C_{day}T104031_N0509_R008_T31UDS_{day}T124031.SAFE"
        broken.mkdir()
        with pytest.warns(S2cdWarning, match=rf"{number + 1} items left out, the first: .*0601T\w*\.SAFE: found 0"):
            assert [s.id for s in search(tmp_path)] == [product.stem]
    shutil.rmtree(product)
    with pytest.warns(S2cdWarning, match="2 items left out"), pytest.raises(NoScenesError, match="no Sentinel-2"):
        search(tmp_path)


def test_a_product_that_cannot_be_understood_is_named(tmp_path: Path) -> None:
    product = write_product(tmp_path, level="1C", baseline="05.09", offset=-1000)
    info = product / "MTD_MSIL1C.xml"
    text = info.read_text()
    info.write_text(text.replace("PRODUCT_URI", "PRODUCT_URL"))
    with pytest.raises(CatalogError, match=r"\.SAFE: cannot be understood: .*no PRODUCT_URI"):
        search(tmp_path)
    info.write_text(text[:300])
    with pytest.raises(CatalogError, match=r"\.SAFE: cannot be understood: ParseError"):
        search(tmp_path)
    info.unlink()
    with pytest.raises(CatalogError, match=r"found 0 files MTD_MSIL\*\.xml, expected one"):
        search(tmp_path)
