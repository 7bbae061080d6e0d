"""Import what a training needs before processes are forked, as a study does, and speed it up.

Importing this module does all of it: a fork server preloads modules and calls nothing.
"""

import signal
import sys

from support.launches import REPOSITORY
from support.quick_megatron import quicken

if str(REPOSITORY) not in sys.path:
    sys.path.insert(0, str(REPOSITORY))  # pretrain_smlp.py is not part of the package

import megatron_smlp.study.preloaded  # noqa: F401

signal.signal(signal.SIGINT, signal.default_int_handler)  # a study's preloading ignores it
quicken()
