"""How networks run on a device: precision, memory and speed, applied to them from outside."""
