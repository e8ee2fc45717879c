"""The small world: captioned pictures drawn from a seed, small models, and what draws and reads their pictures."""

BACKBONES = ("pixart_sigma", "sd35_medium")
"""Those that it has a teacher and a student of."""
