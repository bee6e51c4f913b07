"""Simulated Sentinel-2 series with changes of known truth, for the demo, the benchmarks and the tests."""

from s2cd.simulate.atmosphere import brdf, cirrus, clouds, gain, haze, noise, shadow, shift, sun_angle
from s2cd.simulate.changes import CHANGE_KINDS, HARVEST, truth_between
from s2cd.simulate.series import DRAW_SIZE, simulate, simulate_full_tile

__all__ = [
    "CHANGE_KINDS",
    "DRAW_SIZE",
    "HARVEST",
    "brdf",
    "cirrus",
    "clouds",
    "gain",
    "haze",
    "noise",
    "shadow",
    "shift",
    "simulate",
    "simulate_full_tile",
    "sun_angle",
    "truth_between",
]
