"""Where EDiT is applied to a host's model."""
