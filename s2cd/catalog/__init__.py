"""STAC in: search, static catalogues, and the scenes they hold."""
