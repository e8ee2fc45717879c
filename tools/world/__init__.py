"""The small world's workshop: what trains its teachers, decoders and students, judges them and ships them."""
