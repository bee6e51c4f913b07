"""How the shipped weights were made and scored; never imported by a run."""
