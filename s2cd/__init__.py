"""Change detection on Sentinel-2 time series, Dask-native."""
