"""Imported last by the process that forks those of the tests: collections of garbage leave what is there alone."""

import gc

gc.freeze()
