"""`mhc-tilelang bench`: check, measure, report."""
