"""Run launch/benchmark.py on a newer GPU under the limits of a V100 of 16 GiB: part of launch/gpu_check.sh.

No bfloat16, no TF32, no flash or cuDNN attention, no flex attention, and the memory that is left beside CUDA's context.
"""

import runpy
from pathlib import Path

import torch

from distilspeed.trainer import attention, engines

BYTES = 15 * 2**30
NO_GPU_HAS = (1000, 0)

if torch.cuda.is_available():
    torch.cuda.set_per_process_memory_fraction(BYTES / torch.cuda.get_device_properties(0).total_memory)
torch.backends.cuda.enable_flash_sdp(False)
torch.backends.cuda.enable_cudnn_sdp(False)
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
attention.OLDEST_FLEX_CAPABILITY = engines.OLDEST_BF16_CAPABILITY = NO_GPU_HAS
runpy.run_path(str(Path(__file__).with_name("benchmark.py")), run_name="__main__")
