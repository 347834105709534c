"""What PyTorch is told for the whole process when the model runs on a GPU."""

import torch


def settle() -> None:
    """Two of PyTorch's defaults do not suit this model.

    cuDNN's attention, the first choice on an H100 and newer, builds a plan for every new length of
    queries or keys, which takes tens of milliseconds: at every token of an answer, and at nearly
    every batch in training. The other kernels need none.

    Convolutions in float32 round their inputs to TF32, 10 bits of mantissa. float32 is meant here.

    To have them back: torch.backends.cuda.enable_cudnn_sdp(True) and
    torch.backends.cudnn.allow_tf32 = True, after the load.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.allow_tf32 = False
