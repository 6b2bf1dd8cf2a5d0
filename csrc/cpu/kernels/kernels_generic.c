#define VARIANT generic
#define KERNELS skv_kernels_generic
#include "kernels.inc.h"
