"""`mhc-tilelang memory`: what a backward needs kept, with and without recomputation."""
