"""`mhc-tilelang bench overhead`: what mHC adds to one layer, measured and modelled."""
