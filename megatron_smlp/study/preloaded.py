"""Import what a training needs, in the server that forks a study's trainings (process.py).

The imports take longer than many trainings. They run when this module is imported, because a fork
server preloads modules and calls nothing.
"""

import signal

from megatron_smlp.library_logging import quiet_libraries
from megatron_smlp.megatron_patches.late_compile import late_compile
from megatron_smlp.provenance import software

signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker handles Ctrl-C, and ends its runs

with quiet_libraries(), late_compile():
    # Imported lazily by the first run of a process, which would cost every run a second.
    import torch._dynamo  # noqa: F401
    from megatron.core.tokenizers.text.libraries import huggingface_tokenizer  # noqa: F401

    import megatron_smlp.evaluation.during_training
    import megatron_smlp.flags.parse
    import megatron_smlp.megatron_patches.table
    import megatron_smlp.model
    import megatron_smlp.platform.cpu
    import megatron_smlp.training.loop  # noqa: F401
    import pretrain_smlp  # noqa: F401

software()  # cache it for the sources as they are now: files may change while runs are forked
