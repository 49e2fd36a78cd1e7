"""How a planned step is executed on the device."""
