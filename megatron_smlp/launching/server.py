"""The store of RENDEZVOUS=server, on a machine that outlives those that train."""

from __future__ import annotations

import signal

from torch.distributed import TCPStore

from megatron_smlp.launching import network


def main(port: str) -> int:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        UsageError: the port is taken.
    """
    network.check_port(int(port))
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # in the store's threads too
    store = TCPStore("0.0.0.0", int(port), is_master=True, wait_for_workers=False)
    print(f"serving at port {store.port}", flush=True)
    signal.sigwait(ends)
    return 0
