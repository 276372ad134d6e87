// The kernels that run anywhere.
#define QC_NAMESPACE generic
#include "generic.inc"
