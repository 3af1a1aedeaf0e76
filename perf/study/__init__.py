"""`mhc-tilelang study`: small experiments that show what the constraint does, with tables, pictures and CSVs.

    command    the sub-commands          output   headers, tables, CSVs and the folder that `--out` names
    gain       how signals grow over depth under HC and mHC: `matrices` draws the mappings
    train      a small GPT (`model`) under three connections, several seeds: `runs` trains, `summary` compares
    sinkhorn   what Sinkhorn's iterations do: `flow` step by step, `convergence` and `gradients` in numbers, `cost`
    figures_*  their pictures, in the style of `perf.figures.run`

Each command prints its set-up: a number without it says little. Modules with HELP, add_arguments and run load no torch
before run.
"""
