"""Distillation: from a teacher on disk to EDiT weights. Needs the extra `[distill]`."""
