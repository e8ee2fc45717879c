"""The small world: captioned pictures drawn from a seed, small models, and what draws and reads their pictures."""
