"""Modules and streams: what a model is built from.

connections       HyperConnection, HyperHead
residual_stream   ResidualStream, and stream_* it is made of
recompute, blocks, saved   streams recomputed in the backward
overlap, pipeline   side streams, pipeline stages
"""
