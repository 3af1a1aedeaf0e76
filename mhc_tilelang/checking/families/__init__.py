"""The checks, a family a file, both directions. A file here needs no mention elsewhere: all are imported.

Each takes the case's inputs, and upstream gradients of a backward, and compares with what the reference derives from
the very numbers that the kernel got. How the gradients of a whole function come out of these kernels is the tests'
business.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
