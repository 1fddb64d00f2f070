"""Set before any test imports Triton or starts a process."""

import os
import signal

import torch

if not torch.cuda.is_available():  # without a GPU Triton's kernels run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job: its children would ignore Ctrl-C too
    signal.signal(signal.SIGINT, signal.default_int_handler)
