"""Imports what a training needs, before processes are forked: that takes longer than most of them.

Importing this module does it; a fork server preloads modules and calls nothing.
"""

import gc
import sys

from support.launches import REPOSITORY
from support.quick_megatron import quicken

if str(REPOSITORY) not in sys.path:
    sys.path.insert(0, str(REPOSITORY))  # pretrain_smlp.py is not part of the package

from megatron_smlp.library_logging import quiet_libraries
from megatron_smlp.megatron_patches.late_compile import late_compile

with quiet_libraries(), late_compile():
    # What the first run of a process imports late: a second of each rank otherwise.
    import megatron.core.tokenizers.text.libraries.huggingface_tokenizer  # noqa: F401
    import torch._dynamo  # noqa: F401

    import megatron_smlp.evaluation.during_training
    import megatron_smlp.flags.parse
    import megatron_smlp.megatron_patches.table
    import megatron_smlp.model
    import megatron_smlp.platform.cpu
    import megatron_smlp.training.run  # noqa: F401

    quicken()
gc.freeze()  # a collection after each run would look at all of it again
