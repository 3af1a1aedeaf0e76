"""The calls of the table in plain torch, every form verified before it is timed.

baselines    choosing, compiling and verifying forms
streams, tokens, boundary, boundary_parts   the forward
backward_*   the backward
"""
