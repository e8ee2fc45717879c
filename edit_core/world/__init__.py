"""The small world: captioned pictures drawn from a seed, and all that trains and judges small teachers on them."""

BACKBONES = ("pixart_sigma", "sd35_medium")
"""Those that it has a teacher and a student of."""
