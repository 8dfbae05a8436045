"""Networks: one file each, configs beside them."""
