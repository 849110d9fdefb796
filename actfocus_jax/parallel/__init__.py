"""Many devices, several processes: one program over all of them."""
