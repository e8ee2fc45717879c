"""The small world: captioned pictures drawn from a seed, and all that trains and judges small teachers on them."""
