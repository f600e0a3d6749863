// The losses' operators for CPUs, as torch.ops.distilspeed_cpu; built by cpu_kernels.py.

#include <torch/library.h>

#include "cosine_loss.h"
#include "distillation_loss.h"

TORCH_LIBRARY(distilspeed_cpu, library) {
  library.def("cosine_loss_forward", distilspeed::cosine_loss_forward);
  library.def("cosine_loss_backward", distilspeed::cosine_loss_backward);
  library.def("distillation_loss_forward", distilspeed::distillation_loss_forward);
  library.def("distillation_loss_backward", distilspeed::distillation_loss_backward);
  library.def("distillation_loss_forward_backward", distilspeed::distillation_loss_forward_backward);
}
