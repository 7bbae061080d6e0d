"""Imports what a training needs, in the process that those of a study are forked from (process.py).

That takes longer than many of them. Importing this module does it; a fork server preloads modules
and calls nothing.
"""

import signal

from megatron_smlp.library_logging import quiet_libraries
from megatron_smlp.megatron_patches.late_compile import late_compile
from megatron_smlp.provenance import software

signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the worker's, which ends its runs

with quiet_libraries(), late_compile():
    # What the first run of a process imports late: a second of each run otherwise.
    import torch._dynamo  # noqa: F401
    from megatron.core.tokenizers.text.libraries import huggingface_tokenizer  # noqa: F401

    import megatron_smlp.evaluation.during_training
    import megatron_smlp.flags.parse
    import megatron_smlp.megatron_patches.table
    import megatron_smlp.model
    import megatron_smlp.platform.cpu
    import megatron_smlp.training.loop  # noqa: F401
    import pretrain_smlp  # noqa: F401

software()  # of these texts, whatever becomes of them while runs are forked
